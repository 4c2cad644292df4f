//! Connections: name, TCP, TLS. One at a time, by whoever needs it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use reqwest::Url;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::wire::{Gauge, Wire};

/// When an address has not answered for so long, the next one is tried beside it (RFC 8305, section 5).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// As for reqwest's connections.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// rustls asks for a few KiB at a time; this is what one system call brings instead.
const TLS_BUFFER: usize = 128 << 10;

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum DialError {
    /// The name leads nowhere.
    Name(io::Error),
    /// No address took the connection.
    Connect(io::Error),
    /// TLS failed.
    Tls(io::Error),
    /// The server speaks none of the protocols that were offered to it.
    Protocol,
}

/// Makes connections with one TLS configuration.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    tls: Arc<ClientConfig>,
    patience: Duration,
}

/// A connection, with TLS or without.
#[derive(Debug)]
pub(super) enum Stream {
    Plain(Wire),
    Tls(Box<TlsStream<BufReader<Wire>>>),
}

impl Dialer {
    /// `tls` offers `http/1.1` alone; `patience` bounds name, TCP and TLS together.
    pub(super) fn new(tls: ClientConfig, patience: Duration) -> Self {
        Self {
            tls: Arc::new(tls),
            patience,
        }
    }

    /// A fresh connection to the origin of `url`.
    pub(super) async fn dial(&self, url: &Url) -> Result<(Stream, Arc<Gauge>), DialError> {
        let late = || {
            let text = format!("no connection within {} ms", self.patience.as_millis());
            DialError::Connect(io::Error::new(io::ErrorKind::TimedOut, text))
        };
        timeout(self.patience, self.dial_now(url))
            .await
            .unwrap_or_else(|_| Err(late()))
    }

    async fn dial_now(&self, url: &Url) -> Result<(Stream, Arc<Gauge>), DialError> {
        let nowhere = || io::Error::new(io::ErrorKind::InvalidInput, "the URL names no host");
        let host = url.host_str().ok_or_else(|| DialError::Name(nowhere()))?;
        let host = host.trim_matches(['[', ']']);
        let port = url.port_or_known_default().unwrap_or(443);
        let addresses: Vec<_> = tokio::net::lookup_host((host, port))
            .await
            .map_err(DialError::Name)?
            .collect();
        let tcp = first(addresses).await.map_err(DialError::Connect)?;
        prepare(&tcp);
        let wire = Wire::new(tcp);
        let gauge = wire.gauge();
        if url.scheme() != "https" {
            return Ok((Stream::Plain(wire), gauge));
        }
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| DialError::Tls(io::Error::other(error)))?;
        let buffered = BufReader::with_capacity(TLS_BUFFER, wire);
        let tls = TlsConnector::from(Arc::clone(&self.tls))
            .connect(name, buffered)
            .await
            .map_err(refused)?;
        Ok((Stream::Tls(Box::new(tls)), gauge))
    }
}

/// A server without HTTP/1.1 ends the handshake with the alert that RFC 7301, section 3.2 has for it.
fn refused(error: io::Error) -> DialError {
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol);
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if tls == Some(&alert) {
        DialError::Protocol
    } else {
        DialError::Tls(error)
    }
}

/// The first address that takes a connection.
async fn first(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut rest = addresses.into_iter();
    let mut tries = FuturesUnordered::new();
    loop {
        if tries.is_empty() {
            let Some(next) = rest.next() else {
                return Err(failure);
            };
            tries.push(TcpStream::connect(next));
        }
        tokio::select! {
            Some(result) = tries.next() => match result {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            },
            () = sleep(NEXT_ADDRESS), if rest.len() > 0 => {
                tries.extend(rest.next().map(TcpStream::connect));
            }
        }
    }
}

/// Requests leave at once, and a peer that is gone is noticed.
fn prepare(tcp: &TcpStream) {
    use rustix::net::sockopt;
    // A kernel that refuses makes the connection worse, not wrong.
    let _ = tcp.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(tcp, true);
    let _ = sockopt::set_tcp_keepidle(tcp, KEEPALIVE);
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(wire) => Pin::new(wire).poll_read(cx, buffer),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(wire) => Pin::new(wire).poll_write(cx, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(wire) => Pin::new(wire).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(wire) => Pin::new(wire).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
