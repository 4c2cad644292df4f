//! What hosts.toml may say and what it may not, and which file counts.

use super::*;

fn parsed(text: &str) -> Result<Registered, Unusable> {
    parse(
        text,
        Path::new("/certs.d/docker.io/hosts.toml"),
        "docker.io",
    )
}

fn url(text: &str) -> Option<Url> {
    Some(Url::parse(text).unwrap())
}

#[test]
fn a_file_as_containerd_documents_it() {
    let registered = parsed(
        r#"
server = "https://registry-1.docker.io"
ca = "/etc/certs/upstream.pem"

[host."https://z-mirror.lan:5000"]
  capabilities = ["pull", "resolve", "push"]
  ca = ["/etc/certs/a.pem", "b.pem"]
  client = [["client.cert", "/etc/certs/client.key"], ["both.pem", ""]]
  dial_timeout = "3s"

[host."https://a-mirror.lan/prefix/v2"]
  capabilities = ["pull"]
  client = "/etc/certs/client.pem"
  skip_verify = true
  [host."https://a-mirror.lan/prefix/v2".header]
x-custom-1 = "custom header"
x-custom-2 = ["a", "b"]

[host."http://10.0.0.1:8080/some/root"]
  override_path = true
[host."http://10.0.0.2:8080/some/root"]
"#,
    )
    .unwrap();
    assert_eq!(
        registered.server.base,
        url("https://registry-1.docker.io/v2/")
    );
    assert_eq!(
        registered.server.trust.ca_files,
        [Path::new("/etc/certs/upstream.pem")]
    );
    let [z, a, root, behind] = registered.mirrors.as_slice() else {
        panic!("{registered:?}")
    };
    assert_eq!(
        z.base,
        url("https://z-mirror.lan:5000/v2/"),
        "in the order of the file"
    );
    assert_eq!(z.capabilities, Capabilities::default());
    let certs = |name: &str| Path::new("/etc/certs").join(name);
    let here = |name: &str| Path::new("/certs.d/docker.io").join(name);
    assert_eq!(z.trust.ca_files, [certs("a.pem"), here("b.pem")]);
    assert_eq!(
        z.trust.client,
        [
            (here("client.cert"), certs("client.key")),
            (here("both.pem"), here("both.pem"))
        ]
    );
    assert_eq!(z.trust.dial_timeout, Some(Duration::from_secs(3)));
    assert_eq!(a.base, url("https://a-mirror.lan/prefix/v2/"));
    assert_eq!((a.capabilities.pull, a.capabilities.resolve), (true, false));
    assert_eq!(a.trust.client, [(certs("client.pem"), certs("client.pem"))]);
    assert!(a.trust.skip_verify);
    assert_eq!(a.headers.get_all("x-custom-2").iter().count(), 2);
    assert!(
        !format!("{a:?}").contains("custom header"),
        "headers may be secrets"
    );
    assert_eq!(root.base, url("http://10.0.0.1:8080/some/root/"));
    assert_eq!(behind.base, url("http://10.0.0.2:8080/some/root/v2/"));
}

#[test]
fn mistakes_are_told_with_their_line() {
    for (text, line, said) in [
        ("[host", 1, ""),
        ("server = 7", 1, "is a text"),
        ("\nserver = \"ftp://x\"", 2, "no address"),
        ("[host.\"https://u:p@x\"]", 1, "credential file"),
        ("[host.\"https://x?y=1\"]", 1, "no address"),
        ("[host.\"https://\"]", 1, "no address"),
        ("host = 1", 1, "is a table"),
        ("[host]\n\"https://x\" = 1", 2, "is a table"),
        ("[host.\"https://x\"]\ncapabilities = [\"pul\"]", 2, "`pul`"),
        (
            "[host.\"https://x\"]\nskip_verify = \"yes\"",
            2,
            "true or false",
        ),
        (
            "[host.\"https://x\"]\ndial_timeout = \"3\"",
            2,
            "not a duration",
        ),
        (
            "[host.\"https://x\"]\ndial_timeout = \"0s\"",
            2,
            "not a duration",
        ),
        (
            "[host.\"https://x\"]\nclient = [[\"a\", \"b\", \"c\"]]",
            2,
            "certificate and a key",
        ),
        (
            "[host.\"https://x\".header]\n\"a b\" = \"s3cret\"",
            2,
            "cannot be sent",
        ),
        (
            "[host.\"https://x\".header]\na = \"s3cret\\n\"",
            2,
            "cannot be sent",
        ),
    ] {
        let error = parsed(text).expect_err(text);
        assert_eq!(error.line, line, "{text}: {error:?}");
        assert!(error.reason.contains(said), "{text}: {error:?}");
        assert!(!error.reason.contains("s3cret"));
    }
    let lenient = parsed("server = \"\"\nnew_key = 1\n[host.\"localhost:5000\"]").unwrap();
    assert_eq!(lenient.server, Endpoint::default());
    assert_eq!(lenient.mirrors[0].base, url("http://localhost:5000/v2/"));
}

#[test]
fn which_directory_is_a_registrys() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, mirror: &str| {
        std::fs::create_dir_all(dir.path().join(name)).unwrap();
        let text = format!("[host.\"http://{mirror}\"]");
        std::fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
    };
    let found = |registry: &str| {
        let registered = read(dir.path(), registry).unwrap()?;
        let base = registered.mirrors.first()?.base.clone()?;
        Some(base.host_str().unwrap().to_owned())
    };
    assert_eq!(found("docker.io"), None);
    write("_default", "default");
    write("docker.io", "hub");
    write("r.lan:5000", "with-colon");
    write("[::1]_5000_", "six");
    for (registry, mirror) in [
        ("docker.io", "hub"),
        ("ghcr.io", "default"),
        ("r.lan", "default"),
        ("r.lan:5000", "with-colon"),
        ("[::1]:5000", "six"),
        ("[::1]", "default"),
    ] {
        assert_eq!(found(registry).as_deref(), Some(mirror), "{registry}");
    }
    write("r.lan_5000_", "with-underscores");
    assert_eq!(found("r.lan:5000").as_deref(), Some("with-underscores"));
    std::fs::write(dir.path().join("docker.io/hosts.toml"), "[").unwrap();
    assert!(read(dir.path(), "docker.io").is_err());

    // docker's way: certificates alone.
    let place = dir.path().join("c.lan");
    std::fs::create_dir(&place).unwrap();
    for name in [
        "ca.crt",
        "client.cert",
        "client.key",
        "other.cert",
        "notes.txt",
    ] {
        std::fs::write(place.join(name), "").unwrap();
    }
    let registered = read(dir.path(), "c.lan").unwrap().unwrap();
    assert!(registered.mirrors.is_empty());
    assert_eq!(
        read(dir.path(), "c.lan").unwrap().as_ref(),
        Some(&registered)
    );
    std::fs::write(place.join("client.key"), "renewed").unwrap();
    assert_ne!(
        read(dir.path(), "c.lan").unwrap().as_ref(),
        Some(&registered)
    );
    let trust = registered.server.trust;
    assert_eq!(trust.ca_files, [place.join("ca.crt")]);
    assert_eq!(
        trust.client,
        [(place.join("client.cert"), place.join("client.key"))]
    );
}

#[test]
fn durations_as_go_writes_them() {
    for (text, millis) in [
        ("300ms", Some(300)),
        ("1.5s", Some(1500)),
        ("1m30s", Some(90_000)),
        ("1h", Some(3_600_000)),
    ] {
        assert_eq!(duration(text), millis.map(Duration::from_millis), "{text}");
    }
    for text in [
        "",
        "3",
        "s",
        "3x",
        "-1s",
        "1s2",
        "99999999999999999999h",
        "1..5s",
    ] {
        assert_eq!(duration(text), None, "{text}");
    }
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = parsed(&text);
        duration(&text);
    }
}
