//! A forward proxy as companies have it: CONNECT for TLS, absolute targets for plain HTTP (RFC 9112, section 3.2.2; RFC 9110, 9.3.6).

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::http::{Head, Listener, response};

/// The proxy; it alone knows where the names lead. Ends when dropped.
pub struct Forward {
    listener: Listener,
    shared: Arc<Shared>,
}

struct Shared {
    /// `host:port` and the server that it is.
    names: Vec<(String, SocketAddr)>,
    /// What `Proxy-Authorization` must be.
    wanted: Option<String>,
    asked: Mutex<Vec<String>>,
}

impl Forward {
    pub fn start(names: &[(&str, SocketAddr)], wanted: Option<&str>) -> Self {
        let shared = Arc::new(Shared {
            names: names
                .iter()
                .map(|(name, to)| ((*name).to_owned(), *to))
                .collect(),
            wanted: wanted.map(str::to_owned),
            asked: Mutex::default(),
        });
        let state = shared.clone();
        Self {
            listener: Listener::start(move |stream, _| drop(state.serve(stream))),
            shared,
        }
    }

    /// Its address, as the environment variables have it.
    pub fn url(&self) -> String {
        format!("http://{}", self.listener.address)
    }

    /// Method and server of everything asked so far.
    pub fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().clone()
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(mut head) = Head::read(&mut reader) {
            let target = head.target().to_owned();
            let method = head.method().to_owned();
            let (server, path) = match target.strip_prefix("http://") {
                Some(rest) => {
                    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
                    (server.to_owned(), format!("/{path}"))
                }
                None => (target.clone(), String::new()),
            };
            self.asked
                .lock()
                .unwrap()
                .push(format!("{method} {server}"));
            if self.wanted.is_some() && head.get("proxy-authorization") != self.wanted.as_deref() {
                let challenge = [("Proxy-Authenticate", "Basic realm=\"proxy\"")];
                stream.write_all(&response(407, &challenge, b""))?;
                continue;
            }
            let Some((_, address)) = self.names.iter().find(|(name, _)| *name == server) else {
                stream.write_all(&response(502, &[], b"no such server"))?;
                continue;
            };
            let upstream = TcpStream::connect(address)?;
            if method == "CONNECT" {
                stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n")?;
                return tunnel(stream, upstream);
            }
            // One request a connection is enough for a proxy of tests.
            head.first = format!("{method} {path} HTTP/1.1");
            head.remove("proxy-authorization");
            head.set("Connection", "close");
            let mut upstream = upstream;
            upstream.write_all(&head.encode())?;
            std::io::copy(
                &mut (&mut reader).take(head.length().unwrap_or(0)),
                &mut upstream,
            )?;
            std::io::copy(&mut upstream, &mut stream)?;
            return stream.shutdown(Shutdown::Both);
        }
        Ok(())
    }
}

fn tunnel(one: TcpStream, other: TcpStream) -> std::io::Result<()> {
    let (mut from, mut to) = (one.try_clone()?, other.try_clone()?);
    let back = std::thread::spawn(move || {
        drop(std::io::copy(&mut from, &mut to));
        drop(to.shutdown(Shutdown::Write));
    });
    let (mut from, mut to) = (other, one);
    drop(std::io::copy(&mut from, &mut to));
    drop(to.shutdown(Shutdown::Write));
    drop(back.join());
    Ok(())
}

/// A port of `[::1]` behind which the server at `to` is, for as long as the test runs.
pub fn on_ipv6(to: SocketAddr) -> u16 {
    let listener = TcpListener::bind("[::1]:0").expect("this machine has an IPv6 loopback");
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Ok(upstream) = TcpStream::connect(to) else {
                return;
            };
            std::thread::spawn(move || drop(tunnel(stream, upstream)));
        }
    });
    port
}
