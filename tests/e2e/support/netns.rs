//! Machines on one network: network namespaces with an address each, joined by a bridge in a namespace of its own.

use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::process::Command;

use super::process::run;

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
        let prefix = format!("ocifs{}", std::process::id());
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

    /// Bytes that it has sent, as the kernel counts them.
    pub fn sent(&self) -> u64 {
        let mut command = self.command("cat");
        command.arg("/proc/net/dev");
        let table = super::process::run_command(&mut command, super::PATIENCE).ok();
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
