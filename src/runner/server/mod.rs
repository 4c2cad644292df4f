//! A model over HTTP, with the interface that clients of OpenAI's API expect: `/v1/models`, `/v1/completions`,
//! `/v1/chat/completions` (whole or as server-sent events), and `/health` and `/metrics` for whoever watches it.
//!
//! Requests queue for the one engine. A client that goes away ends its work at the next token.

mod answer;
mod ask;
mod queue;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::engine::Engine;
use answer::Service;

/// Connections served at once; further ones wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 512;
/// How long a client may take to send a request head, and a kept connection may lie idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long running answers may take to end once the server is told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// A bound, not yet running server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Server {
    /// Listens on `addr` (port 0: any free one); connections wait until [`Self::run`].
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(addr: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        Ok(Self { listener, addr })
    }

    /// The address that it listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves `engine` under the name `model` until `shutdown` is done; at most `queue` requests wait for it.
    pub async fn run(
        self,
        engine: Engine,
        model: String,
        queue: usize,
        shutdown: impl Future<Output = ()>,
    ) {
        let service = Arc::new(Service::new(engine, model, queue));
        let (stop, stopped) = watch::channel(false);
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accepted = async {
                let permit = Arc::clone(&room).acquire_owned().await;
                (permit, self.listener.accept().await)
            };
            tokio::select! {
                () = &mut shutdown => break,
                (permit, accepted) = accepted => match accepted {
                    Ok((stream, _)) => {
                        let (service, stopped) = (Arc::clone(&service), stopped.clone());
                        connections.spawn(async move {
                            let _permit = permit;
                            connection(stream, service, stopped).await;
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
        service.stop();
        let _ = stop.send(true);
        let _ = tokio::time::timeout(GRACE, async {
            while connections.join_next().await.is_some() {}
        })
        .await;
    }
}

async fn connection(stream: TcpStream, service: Arc<Service>, mut stopped: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(service.respond(request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut served = pin!(served);
    tokio::select! {
        result = served.as_mut() => {
            if let Err(error) = result {
                tracing::debug!(%error, "a connection ended");
            }
        }
        () = async { let _ = stopped.wait_for(|stopped| *stopped).await; } => {
            served.as_mut().graceful_shutdown();
            let _ = served.await;
        }
    }
}
