//! A read-only registry over an OCI image layout: the distribution API's GET and HEAD, with ranges.
//!
//! Any layout will do: an ocifs cache, what `ocifs push DIR oci:LAYOUT:TAG` wrote, what `skopeo copy` left.
//! How names in `index.json` become repositories and tags is told in `names.rs`. Blobs are
//! served under any repository name: whoever may read the layout may read all of it. Content is sent as it
//! lies on the disk; clients check it against its digest, as they do with any registry.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! let server = ocifs::serve::Server::bind("/srv/models".as_ref(), "127.0.0.1:0".parse().unwrap()).await?;
//! println!("http://{}/v2/", server.addr());
//! server.run(async { let _ = tokio::signal::ctrl_c().await; }).await;
//! # Ok(()) }
//! ```

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod layout;
mod names;
mod range;
mod respond;
mod stats;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use layout::Layout;
pub use stats::{Count, Stats};

/// Connections served at once; further ones wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 512;
/// How long a client may take to send a request head, and a kept connection may lie idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may read nothing of what was sent before the connection is dropped.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long running responses may take to end once the server is told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A bound, not yet running server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
    layout: Arc<Layout>,
    stats: Stats,
}

impl Server {
    /// Opens the layout in `dir` and listens on `addr` (port 0: any free one).
    ///
    /// # Errors
    /// When `dir` is no layout, its `index.json` cannot be read, or the address cannot be had.
    pub async fn bind(dir: &Path, addr: SocketAddr) -> io::Result<Self> {
        let layout = Arc::new(Layout::open(dir)?);
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        Ok(Self {
            listener,
            addr,
            layout,
            stats: Stats::default(),
        })
    }

    /// The address that it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it sends is counted here.
    pub fn stats(&self) -> Stats {
        self.stats.clone()
    }

    /// Serves until `shutdown` is done, then lets running responses end for at most five seconds.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (stop, stopped) = watch::channel(false);
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accepted = async {
                // The semaphore is never closed.
                let permit = Arc::clone(&room).acquire_owned().await;
                (permit, self.listener.accept().await)
            };
            tokio::select! {
                () = &mut shutdown => break,
                (permit, accepted) = accepted => match accepted {
                    Ok((stream, peer)) => {
                        tracing::debug!(%peer, "serve: connection");
                        let (layout, stats) = (Arc::clone(&self.layout), self.stats.clone());
                        let stopped = stopped.clone();
                        connections.spawn(async move {
                            let _permit = permit;
                            connection(stream, layout, stats, stopped).await;
                        });
                    }
                    Err(error) => {
                        // EMFILE and the like pass when connections end.
                        tracing::warn!(%error, "serve: cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
        drop(self.listener);
        let _ = stop.send(true);
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, drained).await.is_err() {
            connections.shutdown().await;
        }
    }
}

async fn connection(
    stream: TcpStream,
    layout: Arc<Layout>,
    stats: Stats,
    mut stopped: watch::Receiver<bool>,
) {
    if let Err(error) = prepare(&stream) {
        tracing::debug!(%error, "serve: socket options");
    }
    let service = service_fn(move |request| {
        let (layout, stats) = (Arc::clone(&layout), stats.clone());
        async move { Ok::<_, Infallible>(respond::respond(layout, stats, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let told_to_stop = async {
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let result = tokio::select! {
        result = &mut connection => result,
        () = told_to_stop => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "serve: connection ended");
    }
}

/// Small answers go out at once, and a client that reads no more is dropped by the kernel
/// (tcp(7), TCP_USER_TIMEOUT, which covers an open window of zero as well).
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let millis = u32::try_from(STALL_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    Ok(())
}
