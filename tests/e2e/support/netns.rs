//! Machines on one network: network namespaces with an address each, joined by a bridge in a namespace of its own.

use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use super::artifact::{Artifact, Published};
use super::process::{Daemon, run, run_command, run_with_input};
use super::{PATIENCE, eventually, scratch};

/// A network; its namespaces go with it.
pub struct Network {
    prefix: String,
    machines: u8,
}

/// One machine in it.
#[derive(Clone)]
pub struct Machine {
    namespace: String,
    pub address: Ipv4Addr,
}

impl Network {
    /// Needs root, as the mounts of these tests do.
    pub fn new() -> Self {
        // Tests of one process run side by side.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("ocifs{}n{number}", std::process::id());
        let network = Self {
            prefix,
            machines: 0,
        };
        let switch = network.switch();
        ip(["netns", "add", &switch]);
        ip(["-n", &switch, "link", "add", "br0", "type", "bridge"]);
        ip(["-n", &switch, "link", "set", "br0", "up"]);
        network
    }

    fn switch(&self) -> String {
        format!("{}s", self.prefix)
    }

    /// Another machine.
    pub fn machine(&mut self) -> Machine {
        self.machines += 1;
        let (number, switch) = (self.machines, self.switch());
        let namespace = format!("{}m{number}", self.prefix);
        let address = Ipv4Addr::new(10, 213, 77, number);
        let port = format!("p{number}");
        ip(["netns", "add", &namespace]);
        #[rustfmt::skip]
        ip(["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &namespace]);
        ip(["-n", &switch, "link", "set", &port, "master", "br0", "up"]);
        ip(["-n", &namespace, "link", "set", "lo", "up"]);
        ip([
            "-n",
            &namespace,
            "addr",
            "add",
            &format!("{address}/24"),
            "dev",
            "eth0",
        ]);
        ip(["-n", &namespace, "link", "set", "eth0", "up"]);
        Machine { namespace, address }
    }
}

impl Machine {
    /// The command as it is run on this machine: same files, same mounts, another network.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .arg("--")
            .arg(program);
        command
    }

    /// Has a command run on this machine, environment and all.
    pub fn wrap(&self, command: &mut Command) {
        let mut here = self.command(command.get_program());
        here.args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => here.env(key, value),
                None => here.env_remove(key),
            };
        }
        *command = here;
    }

    /// Runs a program here to its end and gives what it said.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        run_command(self.command(program).args(args), PATIENCE).ok()
    }

    /// These chains of nftables, in place of those before.
    pub fn rules(&self, chains: &str) {
        let text = format!("flush ruleset\ntable inet trouble {{\n{chains}\n}}\n");
        run_with_input(
            self.command("nft").args(["-f", "-"]),
            text.as_bytes(),
            PATIENCE,
        )
        .ok();
    }

    /// How many packets the counters of its rules have seen.
    pub fn counted(&self) -> u64 {
        let text = self.run("nft", &["list", "ruleset"]);
        let counters = text.split("counter packets ").skip(1);
        counters
            .map(|rest| rest.split(' ').next().unwrap_or_default())
            .map(|number| number.parse::<u64>().expect("a number"))
            .sum()
    }

    /// Cuts its line, or joins it again.
    pub fn link(&self, up: bool) {
        self.run(
            "ip",
            &["link", "set", "eth0", if up { "up" } else { "down" }],
        );
    }

    /// What it sends goes no faster than this (tc-tbf(8)).
    pub fn narrow(&self, rate: &str) {
        #[rustfmt::skip]
        self.run("tc", &["qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms"]);
    }

    /// A docker-registry at port 5000.
    pub fn registry(&self, dir: &Path) -> Daemon {
        let config = json!({
            "version": "0.1",
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": dir.join("data")}},
            "http": {"addr": format!("{}:5000", self.address), "secret": "of no use outside this test"},
        });
        let file = dir.join("config.yml");
        fs::write(&file, config.to_string()).unwrap();
        let mut command = self.command("docker-registry");
        command.arg("serve").arg(&file);
        self.listening(Daemon::start(
            "docker-registry",
            &mut command,
            &dir.join("log"),
        ))
    }

    /// The registry, once it answers at port 5000.
    pub fn listening(&self, daemon: Daemon) -> Daemon {
        eventually(PATIENCE, "the registry answers", || {
            let mut command = self.command("curl");
            command.args(["-s", "-f", &format!("http://{}:5000/v2/", self.address)]);
            let answered = run_command(&mut command, PATIENCE).status.success();
            answered.then_some(())
        });
        daemon
    }

    /// Pushes an artifact to its registry.
    pub fn publish(&self, artifact: &Artifact, name: &str) -> Published {
        let layout = scratch("layout");
        let published = artifact.write(layout.path(), "m");
        let mut skopeo = self.command("skopeo");
        skopeo.args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"]);
        skopeo.arg(format!("oci:{}:m", layout.path().display()));
        skopeo.arg(format!("docker://{}:5000/{name}", self.address));
        run_command(&mut skopeo, PATIENCE).ok();
        published
    }

    /// Bytes that it has sent, as the kernel counts them.
    pub fn sent(&self) -> u64 {
        let mut command = self.command("cat");
        command.arg("/proc/net/dev");
        let table = run_command(&mut command, PATIENCE).ok();
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"))
            .expect("eth0 is there");
        let sent = line
            .split_whitespace()
            .nth(8)
            .expect("a column for bytes sent");
        sent.parse().expect("a number")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let machines = (1..=self.machines).map(|number| format!("{}m{number}", self.prefix));
        for namespace in machines.chain([self.switch()]) {
            let _ = Command::new("ip")
                .args(["netns", "del", &namespace])
                .status();
        }
    }
}

fn ip<const N: usize>(args: [&str; N]) {
    run("ip", args).ok();
}
