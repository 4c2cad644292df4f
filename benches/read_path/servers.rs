//! nginx over the blobs of one artifact, on loopback and behind a limited link.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const NAMESPACE: &str = "ocifs-bench";
const NEAR: &str = "10.213.77.1";
const FAR: &str = "10.213.77.2";

/// Where the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Loopback,
    LimitedLink,
}

/// An artifact of one weight file, as a directory that nginx serves.
pub(crate) struct Origin {
    dir: PathBuf,
    digest: String,
    size: u64,
}

impl Origin {
    /// Makes a model of `size` random bytes and packages it with the binary itself.
    pub(crate) fn make(dir: &Path, size: u64) -> Self {
        let model = dir.join("model");
        fs::create_dir(&model).unwrap();
        write_weights(&model.join("model.safetensors"), size);
        let layout = dir.join("layout");
        let target = format!("oci:{}:bench/m:v1", layout.display());
        run(Command::new(env!("CARGO_BIN_EXE_ocifs"))
            .arg("push")
            .arg(&model)
            .arg(target));
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        let www = dir.join("www/v2/bench/m");
        for sub in ["manifests", "blobs"] {
            fs::create_dir_all(www.join(sub)).unwrap();
        }
        for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("sha256:{}", path.file_name().unwrap().to_str().unwrap());
            fs::hard_link(&path, www.join("blobs").join(name)).unwrap();
        }
        let manifest_file = www.join("blobs").join(&manifest);
        for name in ["v1", &manifest] {
            fs::copy(&manifest_file, www.join("manifests").join(name)).unwrap();
        }
        let parsed: serde_json::Value =
            serde_json::from_slice(&fs::read(&manifest_file).unwrap()).unwrap();
        let layers = parsed["layers"].as_array().unwrap();
        let layer = layers
            .iter()
            .max_by_key(|layer| layer["size"].as_u64())
            .unwrap();
        Self {
            dir: dir.to_owned(),
            digest: layer["digest"].as_str().unwrap().to_owned(),
            size: layer["size"].as_u64().unwrap(),
        }
    }

    /// Bytes of the weight file.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Its file in a cache that has it whole.
    pub(crate) fn sealed_in(&self, cache: &Path) -> PathBuf {
        cache
            .join("blobs/sha256")
            .join(self.digest.trim_start_matches("sha256:"))
    }

    /// Starts a server.
    pub(crate) fn serve(&self, place: Place) -> Server {
        let link = (place == Place::LimitedLink).then(Link::up);
        let host = if link.is_some() { FAR } else { "127.0.0.1" };
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let log = self.dir.join("access.log");
        let _ = fs::remove_file(&log);
        let config = self.dir.join("nginx.conf");
        let text = format!(
            "user root; daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log; \
             events {{ worker_connections 256; }} \
             http {{ log_format sent '$body_bytes_sent'; access_log {log} sent; sendfile on; tcp_nodelay on; \
             keepalive_requests 1000000; server {{ listen {host}:{port}; root {dir}/www; }} }}",
            dir = self.dir.display(),
            log = log.display(),
        );
        fs::write(&config, text).unwrap();
        let mut command = match &link {
            Some(_) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", NAMESPACE, "nginx"]);
                command
            }
            None => Command::new("nginx"),
        };
        command
            .arg("-c")
            .arg(&config)
            .arg("-p")
            .arg(&self.dir)
            .stderr(Stdio::null());
        let child = command
            .spawn()
            .expect("nginx is installed (Debian: nginx-light)");
        let address = format!("{host}:{port}");
        let start = Instant::now();
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "nginx does not answer"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Server {
            child,
            address,
            log,
            digest: self.digest.clone(),
            size: self.size,
            _link: link,
        }
    }
}

/// A server that ends when it is dropped.
pub(crate) struct Server {
    child: Child,
    /// `host:port`.
    pub(crate) address: String,
    log: PathBuf,
    digest: String,
    pub(crate) size: u64,
    _link: Option<Link>,
}

impl Server {
    /// The weight file's URL.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/v2/bench/m/blobs/{}", self.address, self.digest)
    }

    /// Bytes of all bodies that were sent to the end or broken off.
    pub(crate) fn sent(&self) -> u64 {
        // A line is written when its request ends.
        std::thread::sleep(Duration::from_millis(300));
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines()
            .filter_map(|line| line.parse::<u64>().ok())
            .sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// Two virtual interfaces with a token bucket between.
struct Link;

impl Link {
    fn up() -> Self {
        let _ = Command::new("ip")
            .args(["netns", "del", NAMESPACE])
            .stderr(Stdio::null())
            .status();
        let ip = |line: &str| run(Command::new("ip").args(line.split(' ')));
        ip(&format!("netns add {NAMESPACE}"));
        let link = Self;
        ip(&format!(
            "link add ocifs-near type veth peer name ocifs-far netns {NAMESPACE}"
        ));
        ip(&format!("addr add {NEAR}/30 dev ocifs-near"));
        ip("link set ocifs-near up");
        ip(&format!("-n {NAMESPACE} addr add {FAR}/30 dev ocifs-far"));
        ip(&format!("-n {NAMESPACE} link set ocifs-far up"));
        let limit = "qdisc add dev ocifs-far root tbf rate 4gbit burst 4mb latency 20ms";
        run(Command::new("ip")
            .args(["netns", "exec", NAMESPACE, "tc"])
            .args(limit.split(' ')));
        link
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", NAMESPACE])
            .status();
    }
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// One tensor of pseudo-random bytes.
fn write_weights(path: &Path, size: u64) {
    let header =
        format!("{{\"w\":{{\"dtype\":\"U8\",\"shape\":[{size}],\"data_offsets\":[0,{size}]}}}}");
    let mut out = BufWriter::new(File::create(path).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    for _ in 0..size / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes()).unwrap();
    }
    out.flush().unwrap();
}
