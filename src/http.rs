//! A server of HTTP/1.1: connections that are bounded in number and idleness, and an end that waits for those that are being answered.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Connections served at once; further ones wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 512;
/// How long a client may take to send a request head, and a kept connection may lie idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may read nothing of what was sent before the connection is dropped.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long running responses may take to end once the server is told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// Answers requests with `respond` until `shutdown` is done, then lets running responses end for at most five seconds.
pub(crate) async fn serve<R, F, B>(
    listener: TcpListener,
    respond: R,
    shutdown: impl Future<Output = ()>,
) where
    R: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send,
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let (stop, stopped) = watch::channel(false);
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, listener.accept().await)
        };
        tokio::select! {
            () = &mut shutdown => break,
            (permit, accepted) = accepted => match accepted {
                Ok((stream, peer)) => {
                    tracing::debug!(%peer, "a connection");
                    let (respond, stopped) = (respond.clone(), stopped.clone());
                    connections.spawn(async move {
                        let _permit = permit;
                        connection(stream, respond, stopped).await;
                    });
                }
                Err(error) => {
                    // EMFILE and the like pass when connections end.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    let _ = stop.send(true);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, drained).await.is_err() {
        connections.shutdown().await;
    }
}

async fn connection<R, F, B>(stream: TcpStream, respond: R, mut stopped: watch::Receiver<bool>)
where
    R: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>>,
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + 'static,
{
    if let Err(error) = prepare(&stream) {
        tracing::debug!(%error, "socket options");
    }
    let service = service_fn(move |request| {
        let response = respond(request);
        async move { Ok::<_, Infallible>(response.await) }
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
        tracing::debug!(%error, "a connection ended");
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
