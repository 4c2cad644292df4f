//! A model over HTTP, with the interface that clients of OpenAI's API expect: `/v1/models`, `/v1/completions`,
//! `/v1/chat/completions` (whole or as server-sent events), and `/health` and `/metrics` for whoever watches it.
//!
//! Requests queue for the one engine. A client that goes away ends its work at the next token.

mod answer;
mod ask;
mod queue;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use super::engine::Engine;
use crate::http;
use answer::Service;

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
        let answering = Arc::clone(&service);
        let respond = move |request| Arc::clone(&answering).respond(request);
        let shutdown = async {
            shutdown.await;
            service.stop();
        };
        http::serve(self.listener, respond, shutdown).await;
    }
}
