//! A certificate authority of our own, made by `openssl`.

use std::path::{Path, PathBuf};

use super::process::run;

/// A directory with a CA and a server certificate for `localhost`, `registry.test` and `127.0.0.1`.
pub struct Certs {
    /// What clients must trust: `ca.crt`.
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Certs {
    /// Makes the files in `dir`.
    pub fn make(dir: &Path) -> Self {
        let path = |name: &str| dir.join(name);
        let text = |name: &str| path(name).to_str().unwrap().to_owned();
        run(
            "openssl",
            [
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=ocifs test CA",
                "-addext",
                "basicConstraints=critical,CA:TRUE",
                "-addext",
                "keyUsage=critical,keyCertSign,cRLSign",
                "-keyout",
                &text("ca.key"),
                "-out",
                &text("ca.crt"),
            ],
        )
        .ok();
        run(
            "openssl",
            [
                "req",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-subj",
                "/CN=localhost",
                "-keyout",
                &text("server.key"),
                "-out",
                &text("server.csr"),
            ],
        )
        .ok();
        std::fs::write(
            path("server.ext"),
            "subjectAltName=DNS:localhost,DNS:registry.test,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n",
        )
        .unwrap();
        run(
            "openssl",
            [
                "x509",
                "-req",
                "-days",
                "2",
                "-in",
                &text("server.csr"),
                "-CA",
                &text("ca.crt"),
                "-CAkey",
                &text("ca.key"),
                "-CAcreateserial",
                "-extfile",
                &text("server.ext"),
                "-out",
                &text("server.crt"),
            ],
        )
        .ok();
        Self {
            ca: path("ca.crt"),
            certificate: path("server.crt"),
            key: path("server.key"),
        }
    }

    /// A certificate for a client, signed by the same CA, beside the others: certificate and key.
    pub fn client(&self, name: &str) -> (PathBuf, PathBuf) {
        let dir = self.ca.parent().unwrap();
        let path = |ending: &str| dir.join(format!("{name}.{ending}"));
        let text = |ending: &str| path(ending).to_str().unwrap().to_owned();
        let subject = format!("/CN={name}");
        #[rustfmt::skip]
        run("openssl", [
            "req", "-newkey", "rsa:2048", "-nodes", "-subj", &subject, "-keyout", &text("key"), "-out", &text("csr"),
        ]).ok();
        std::fs::write(
            path("ext"),
            "basicConstraints=CA:FALSE\nextendedKeyUsage=clientAuth\n",
        )
        .unwrap();
        let (ca, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        #[rustfmt::skip]
        run("openssl", [
            "x509", "-req", "-days", "2", "-in", &text("csr"), "-CA", ca.to_str().unwrap(), "-CAkey", key.to_str().unwrap(),
            "-CAcreateserial", "-extfile", &text("ext"), "-out", &text("cert"),
        ]).ok();
        (path("cert"), path("key"))
    }
}
