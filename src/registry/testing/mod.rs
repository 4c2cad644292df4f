//! A small HTTP/1.1 server for tests that says whatever a test wants, true or not, and remembers what it was asked.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::base::{Deadline, Digest};
use crate::registry::{HttpVersion, Reference, Registry, RegistryConfig, Repository};

pub(crate) mod script;
mod tls;
pub(super) use tls::{AUTHORITY, CERTIFICATE, KEY};

/// What a client asked.
#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path and query.
    pub(super) target: String,
    /// Names in lower case.
    pub(super) headers: HashMap<String, String>,
    pub(super) body: Vec<u8>,
}

impl Request {
    /// A header, empty when it is missing.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// First and last byte of a closed `Range`.
    pub(super) fn range(&self) -> (usize, usize) {
        let range = self
            .header("range")
            .strip_prefix("bytes=")
            .expect("a range");
        let (first, last) = range.split_once('-').expect("a closed range");
        (
            first.parse().expect("a number"),
            last.parse().expect("a number"),
        )
    }
}

/// How an answer ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    /// As announced.
    Right,
    /// The connection is closed behind the body, whatever was announced.
    Close,
    /// The connection is closed without an answer.
    HangUp,
    /// Nothing more comes, and the connection stays open.
    Stall,
    /// Zeros follow for as long as the client reads, in chunks.
    Endless,
}

/// What the server says.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    length: Option<u64>,
    ending: Ending,
}

/// An answer with a body and its right length.
pub(super) fn reply(status: u16, body: impl Into<Vec<u8>>) -> Reply {
    let body = body.into();
    Reply {
        status,
        headers: Vec::new(),
        length: Some(body.len() as u64),
        body,
        ending: Ending::Right,
    }
}

/// No answer at all.
pub(super) fn hang_up() -> Reply {
    Reply {
        ending: Ending::HangUp,
        ..reply(500, "")
    }
}

impl Reply {
    pub(super) fn header(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }
    /// Announces another length than the body has.
    pub(super) fn length(mut self, length: u64) -> Self {
        self.length = Some(length);
        self
    }
    pub(super) fn chunked(mut self) -> Self {
        self.length = None;
        self
    }
    pub(super) fn then_close(mut self) -> Self {
        self.ending = Ending::Close;
        self
    }
    pub(super) fn then_stall(mut self) -> Self {
        self.ending = Ending::Stall;
        self
    }
    pub(super) fn then_endless(mut self) -> Self {
        self.length = None;
        self.ending = Ending::Endless;
        self
    }
}

/// A blob's right answer to a right request.
pub(super) fn serve_blob(content: &[u8], request: &Request) -> Reply {
    let (first, last) = request.range();
    reply(206, &content[first..=last]).header(
        "Content-Range",
        format!("bytes {first}-{last}/{}", content.len()),
    )
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server on a free port of 127.0.0.1.
pub(super) struct Server {
    /// `127.0.0.1:port`.
    pub(super) address: String,
    seen: Arc<Mutex<Vec<Request>>>,
    over: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    listener: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    pub(super) fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", handler)
    }

    pub(super) fn start_at(
        address: &str,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::listen(address, None, Arc::new(handler))
    }

    /// The same with TLS, under [`AUTHORITY`].
    pub(super) fn start_tls(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_tls_at("127.0.0.1:0", handler)
    }

    pub(super) fn start_tls_at(
        address: &str,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
        let certificate = CertificateDer::from_pem_slice(tls::CERTIFICATE.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(tls::KEY.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        Self::listen(address, Some(Arc::new(config)), Arc::new(handler))
    }

    fn listen(
        address: &str,
        tls: Option<Arc<rustls::ServerConfig>>,
        handler: Arc<Handler>,
    ) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let connections: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let mut server = Self {
            address,
            seen: seen.clone(),
            over: over.clone(),
            connections: connections.clone(),
            listener: None,
        };
        server.listener = Some(std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                // Head and body are written apart: without this each answer waits for an acknowledgement.
                stream.set_nodelay(true).unwrap();
                let connection = stream.try_clone().unwrap();
                connections.lock().unwrap().extend(stream.try_clone());
                let (tls, handler, seen) = (tls.clone(), handler.clone(), seen.clone());
                std::thread::spawn(move || {
                    // Clients hang up when they like: an error ends the connection, and the test looks at the client.
                    let _ = match tls {
                        Some(config) => rustls::ServerConnection::new(config)
                            .map_err(io::Error::other)
                            .and_then(|tls| {
                                serve(rustls::StreamOwned::new(tls, stream), &*handler, &seen)
                            }),
                        None => serve(stream, &*handler, &seen),
                    };
                    let _ = connection.shutdown(std::net::Shutdown::Both);
                });
            }
        }));
        server
    }

    /// Everything asked so far, in order of arrival.
    pub(super) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// How many connections were made, the probe for TLS among them.
    pub(super) fn accepted(&self) -> usize {
        self.connections.lock().unwrap().len()
    }

    /// How many requests had this in their target.
    pub(super) fn count(&self, part: &str) -> usize {
        self.seen()
            .iter()
            .filter(|request| request.target.contains(part))
            .count()
    }

    pub(super) fn repository(&self) -> Repository {
        Repository::new(&self.address, "org/model").unwrap()
    }

    pub(super) fn reference(&self, tag: &str) -> Reference {
        Reference::tagged(self.repository(), tag.parse().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes the listener, and ends with it: the port is free then.
        let _ = TcpStream::connect(&self.address);
        let _ = self.listener.take().map(std::thread::JoinHandle::join);
        for connection in self.connections.lock().unwrap().iter() {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn serve<S: Read + Write>(
    stream: S,
    handler: &Handler,
    seen: &Mutex<Vec<Request>>,
) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read_request(&mut stream)? {
        seen.lock().unwrap().push(request.clone());
        let reply = handler(&request);
        if reply.ending == Ending::HangUp {
            return Ok(());
        }
        let out = stream.get_mut();
        let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
        for (name, value) in &reply.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &match reply.length {
            Some(length) => format!("Content-Length: {length}\r\n\r\n"),
            None => "Transfer-Encoding: chunked\r\n\r\n".to_owned(),
        };
        out.write_all(head.as_bytes())?;
        if request.method != "HEAD" {
            match reply.length {
                Some(_) => out.write_all(&reply.body)?,
                None => {
                    if !reply.body.is_empty() {
                        write!(out, "{:x}\r\n", reply.body.len())?;
                        out.write_all(&reply.body)?;
                        out.write_all(b"\r\n")?;
                    }
                    if reply.ending != Ending::Endless {
                        out.write_all(b"0\r\n\r\n")?;
                    }
                }
            }
        }
        out.flush()?;
        match reply.ending {
            Ending::Right => {}
            Ending::Close | Ending::HangUp => return Ok(()),
            Ending::Stall => std::thread::sleep(Duration::from_secs(30)),
            Ending::Endless => loop {
                write!(out, "10000\r\n")?;
                out.write_all(&[0; 0x10000])?;
                out.write_all(b"\r\n")?;
            },
        }
    }
    Ok(())
}

/// `None` at the end of the connection, and for what is no HTTP.
fn read_request<S: Read>(stream: &mut BufReader<S>) -> io::Result<Option<Request>> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line)?;
    let Ok(first) = String::from_utf8(line) else {
        return Ok(None);
    };
    let mut words = first.split_whitespace();
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut request = Request {
        method: method.to_owned(),
        target: target.to_owned(),
        ..Request::default()
    };
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        request
            .headers
            .insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = request.header("content-length").parse().unwrap_or(0);
    request.body = vec![0; length];
    stream.read_exact(&mut request.body)?;
    Ok(Some(request))
}

/// Settings without credentials; the waits are for a busy machine.
pub(super) fn config() -> RegistryConfig {
    RegistryConfig {
        plain_http: Vec::new(),
        ca_files: Vec::new(),
        auth_files: None,
        hosts_dir: None,
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_secs(8),
        http: HttpVersion::Auto,
        max_connections: RegistryConfig::MOST_CONNECTIONS,
    }
}

/// A client with [`config`].
pub(super) fn registry() -> Registry {
    Registry::new(config()).unwrap()
}

/// A client that waits half a second for a silent server.
pub(super) fn impatient() -> Registry {
    let stall_timeout = Duration::from_millis(500);
    Registry::new(RegistryConfig {
        stall_timeout,
        ..config()
    })
    .unwrap()
}

/// A client that has a credential file with these `auths`.
pub(super) fn registry_with(auths: &str) -> (Registry, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    std::fs::write(&file, format!(r#"{{"auths":{{{auths}}}}}"#)).unwrap();
    (
        Registry::new(RegistryConfig {
            auth_files: Some(vec![file]),
            ..config()
        })
        .unwrap(),
        dir,
    )
}

/// Long enough for every test, short enough for a hanging one.
pub(super) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// `n` bytes that differ from their neighbours, and their digest.
pub(super) fn content(n: usize) -> (Vec<u8>, Digest) {
    let content: Vec<u8> = (0..n).map(|i| (i * 31 % 251) as u8).collect();
    let digest = Digest::of(&content);
    (content, digest)
}
