//! Where bytes come from: nginx for the wire, Debian's docker-registry for the usual case, and links between.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::relay::Relay;

/// How long a byte is under way from or to [`Place::Distant`].
const DISTANCE: Duration = Duration::from_millis(1);

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Loopback,
    /// A link of 4 Gbit/s.
    Limited,
    /// A link like that, without the limit: every byte that crosses it is counted while it is under way.
    Counted,
    /// Loopback, with a millisecond on the way there and another on the way back: a server in the same town.
    Distant,
    /// docker-registry on loopback.
    Registry,
}

impl Place {
    /// As the table calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loopback | Self::Counted => "loopback",
            Self::Limited => "4 Gbit/s",
            Self::Distant => "1 ms away",
            Self::Registry => "registry",
        }
    }
}

/// A server that ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// `host:port`.
    pub(crate) address: String,
    log: PathBuf,
    link: Option<Link>,
    _relay: Option<Relay>,
}

/// What a server was asked for and sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) requests: u64,
    /// Bytes of bodies, also of those that were broken off.
    pub(crate) bytes: u64,
}

impl Traffic {
    /// What came after `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

impl Server {
    /// nginx over the files below `www`; what it needs itself goes to `dir`.
    pub(crate) fn nginx(www: &Path, dir: &Path, place: Place) -> Self {
        let link = match place {
            Place::Limited => Some(Link::up(Some("4gbit"))),
            Place::Counted => Some(Link::up(None)),
            Place::Loopback | Place::Distant | Place::Registry => None,
        };
        let host = link.as_ref().map_or("127.0.0.1".to_owned(), Link::far);
        let address = format!("{host}:{}", free_port());
        let (log, config) = (dir.join("access.log"), dir.join("nginx.conf"));
        let _ = fs::remove_file(&log);
        let text = format!(
            "user root; daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log; \
             events {{ worker_connections 1024; }} \
             http {{ access_log {log} combined; sendfile on; tcp_nodelay on; keepalive_requests 1000000; \
             server {{ listen {address}; root {www}; location /plain/ {{ autoindex on; }} }} }}",
            dir = dir.display(),
            log = log.display(),
            www = www.display(),
        );
        fs::write(&config, text).unwrap();
        let mut command = match &link {
            Some(link) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &link.namespace, "nginx"]);
                command
            }
            None => Command::new("nginx"),
        };
        command.arg("-c").arg(&config).arg("-p").arg(dir);
        let child = command
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx is installed (Debian: nginx-light)");
        let mut server = Self {
            child,
            address,
            log,
            link,
            _relay: None,
        };
        server.wait("nginx");
        if place == Place::Distant {
            let relay = Relay::to(&server.address, DISTANCE);
            server.address.clone_from(&relay.address);
            server._relay = Some(relay);
        }
        server
    }

    /// docker-registry with its storage in `dir`; `None` where it is not installed.
    pub(crate) fn registry(dir: &Path) -> Option<Self> {
        fs::create_dir_all(dir).unwrap();
        let address = format!("127.0.0.1:{}", free_port());
        let (log, config) = (dir.join("access.log"), dir.join("config.yml"));
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n\
             storage: {{filesystem: {{rootdirectory: '{}/storage'}}}}\n",
            dir.display()
        );
        fs::write(&config, text).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        let child = command
            .stdout(File::create(&log).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut server = Self {
            child,
            address,
            log,
            link: None,
            _relay: None,
        };
        server.wait("docker-registry");
        Some(server)
    }

    fn wait(&mut self, name: &str) {
        let start = Instant::now();
        while TcpStream::connect(&self.address).is_err() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended: {ended:?}");
            let waited = start.elapsed();
            assert!(waited < Duration::from_secs(10), "{name} does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// All that was asked for and sent until now, by the access log: a request counts when it has ended.
    pub(crate) fn traffic(&self) -> Traffic {
        // The line of a request is written a moment after its last byte.
        std::thread::sleep(Duration::from_millis(100));
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let mut traffic = Traffic::default();
        // The combined log format: … "GET /path HTTP/1.1" 206 65536 "-" "agent"
        for line in log.lines() {
            let Some(answer) = line.split('"').nth(2) else {
                continue;
            };
            traffic.requests += 1;
            let bytes = answer.split_whitespace().nth(1);
            traffic.bytes += bytes
                .and_then(|bytes| bytes.parse::<u64>().ok())
                .unwrap_or(0);
        }
        traffic
    }

    /// Bytes that came over the link until now, those of TCP and IP included.
    pub(crate) fn crossed(&self) -> u64 {
        let link = self.link.as_ref().expect("a server behind a link");
        let path = format!("/sys/class/net/{}/statistics/rx_bytes", link.near);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Two virtual interfaces, the far one in a network namespace of its own.
#[derive(Debug)]
struct Link {
    namespace: String,
    near: String,
    net: String,
}

impl Link {
    /// With a token bucket on what the far side sends, if there is a rate.
    fn up(rate: Option<&str>) -> Self {
        // Names and addresses of this process, so that two benchmarks do not take each other's.
        let id = std::process::id();
        let link = Self {
            namespace: format!("ocifs-bench-{id}"),
            near: format!("ocifs-n{id}"),
            net: format!("10.213.{}", id % 256),
        };
        let (namespace, near, net) = (&link.namespace, &link.near, &link.net);
        let quiet = |line: String| {
            let mut command = Command::new("ip");
            let _ = command.args(line.split(' ')).stderr(Stdio::null()).status();
        };
        quiet(format!("netns del {namespace}"));
        quiet(format!("link del {near}"));
        let ip = |line: String| run(Command::new("ip").args(line.split(' ')));
        ip(format!("netns add {namespace}"));
        ip(format!(
            "link add {near} type veth peer name far netns {namespace}"
        ));
        ip(format!("addr add {net}.1/30 dev {near}"));
        ip(format!("link set {near} up"));
        ip(format!("-n {namespace} addr add {net}.2/30 dev far"));
        ip(format!("-n {namespace} link set far up"));
        if let Some(rate) = rate {
            ip(format!(
                "netns exec {namespace} tc qdisc add dev far root tbf rate {rate} burst 4mb latency 20ms"
            ));
        }
        link
    }

    /// The far side's address.
    fn far(&self) -> String {
        format!("{}.2", self.net)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut command = Command::new("ip");
        let _ = command.args(["netns", "del", &self.namespace]).status();
    }
}

/// Runs a command that must succeed; returns what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
