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

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::http;
use layout::Layout;
pub use stats::{Count, Stats};

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
        let (layout, stats) = (self.layout, self.stats);
        let respond = move |request| respond::respond(Arc::clone(&layout), stats.clone(), request);
        http::serve(self.listener, respond, shutdown).await;
    }
}
