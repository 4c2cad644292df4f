//! HTTP/1.1 connections for large bodies, kept and reused per origin.
//!
//! Over HTTP/2 all requests to a host share one connection: one TCP window, and one core that decrypts. Parts of a blob come over
//! connections of their own instead. Small answers stay with reqwest, where HTTP/2 saves handshakes, unless a connection is idle here.
//!
//! A connection has no task: whoever waits for an answer drives it. So bytes pass no channel between threads on their way, and a
//! request is on the wire when its future was polled once.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use reqwest::Url;
use tokio::time::{Sleep, sleep};

use super::address::address_of;
use super::dial::{DialError, Dialer, Stream};
use super::wire::{Gauge, PATIENCE};
use crate::base::{Instant, lock};

/// Most idle connections that are kept for an origin.
const MOST_IDLE: usize = 32;
/// Idle connections older than this are not used again: proxies on the way forget them silently.
const LONGEST_IDLE: Duration = Duration::from_secs(55);
/// How much one read takes from a connection.
const READ_SIZE: usize = 512 << 10;

/// Why there is no response.
#[derive(Debug)]
pub(super) enum PoolError {
    /// The server does not speak HTTP/1.1: ask it otherwise, now and later.
    Otherwise,
    /// No connection.
    Dial(DialError),
    /// The connection failed under the request.
    Exchange(hyper::Error),
}

/// Connections to any number of origins.
#[derive(Debug)]
pub(super) struct Pool {
    dialer: Dialer,
    origins: Arc<Mutex<HashMap<String, Origin>>>,
}

#[derive(Debug, Default)]
struct Origin {
    idle: Vec<Connection>,
    /// Somebody will look after the idle ones when they have grown old: nobody drives them, so nobody else hears of their end.
    watched: bool,
    /// It refused HTTP/1.1.
    otherwise: bool,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    driver: Driver,
    gauge: Arc<Gauge>,
    since: Instant,
}

/// What moves bytes between a connection's socket and its two ends. It does so only while it is polled.
#[derive(Debug)]
struct Driver(http1::Connection<TokioIo<Stream>, Empty<Bytes>>);

impl Driver {
    /// Moves what can be moved. What ends the connection shows at the end that waits for something.
    fn drive(&mut self, cx: &mut Context<'_>) {
        let _ = Pin::new(&mut self.0).poll(cx);
    }

    /// Polls `end`, and the connection where that lacks something.
    fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut end: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        if let Poll::Ready(done) = end(cx) {
            return Poll::Ready(done);
        }
        self.drive(cx);
        end(cx)
    }
}

impl Connection {
    fn is_fresh(&self) -> bool {
        !self.sender.is_closed() && self.since.elapsed() < LONGEST_IDLE
    }

    /// Waits until it takes a request: the end of the last body and that are two events.
    async fn ready(&mut self) -> Result<(), hyper::Error> {
        poll_fn(|cx| {
            // A server that has hung up is heard of here, before a request is lost on it.
            self.driver.drive(cx);
            self.sender.poll_ready(cx)
        })
        .await
    }

    async fn send(
        &mut self,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let mut sent = pin!(self.sender.send_request(request));
        poll_fn(|cx| self.driver.poll(cx, |cx| sent.as_mut().poll(cx))).await
    }
}

impl Pool {
    pub(super) fn new(dialer: Dialer) -> Self {
        Self {
            dialer,
            origins: Arc::default(),
        }
    }

    /// Sends a GET and returns when the response head is there; over a connection of its own when `fresh` is asked for.
    pub(super) async fn get(
        &self,
        url: &Url,
        headers: &HeaderMap,
        fresh: bool,
    ) -> Result<Response<PooledBody>, PoolError> {
        let request = request(url, headers).ok_or(PoolError::Otherwise)?;
        let key = origin_of(url);
        loop {
            let Some(idle) = self.take_idle(&key)?.filter(|_| !fresh) else {
                break;
            };
            match self.exchange(idle, &key, request.clone()).await {
                // The server closed it while it was idle, which says nothing about the request (RFC 9112, section 9.3.1).
                Err((_, false)) => continue,
                Err((error, true)) => return Err(PoolError::Exchange(error)),
                Ok(response) => return Ok(response),
            }
        }
        let (stream, gauge) = match self.dialer.dial(url).await {
            Ok(dialed) => dialed,
            Err(DialError::Protocol) => return Err(self.note_otherwise(key)),
            Err(error) => return Err(PoolError::Dial(error)),
        };
        let (sender, connection) = http1::Builder::new()
            .read_buf_exact_size(Some(READ_SIZE))
            .handshake(TokioIo::new(stream))
            .await
            .map_err(PoolError::Exchange)?;
        tracing::trace!(origin = key, "connected");
        let connection = Connection {
            sender,
            driver: Driver(connection),
            gauge,
            since: Instant::now(),
        };
        match self.exchange(connection, &key, request).await {
            Ok(response) => Ok(response),
            Err((error, _)) if error.is_parse_version_h2() => Err(self.note_otherwise(key)),
            Err((error, _)) => Err(PoolError::Exchange(error)),
        }
    }

    /// Whether a connection to the origin of `url` is idle, so that a small request costs no handshake here.
    pub(super) fn has_idle(&self, url: &Url) -> bool {
        let origins = lock(&self.origins);
        let origin = origins.get(&origin_of(url));
        origin.is_some_and(|origin| origin.idle.iter().any(Connection::is_fresh))
    }

    /// A connection that is idle and open, the one used last first, so that those no longer needed grow old.
    fn take_idle(&self, key: &str) -> Result<Option<Connection>, PoolError> {
        let mut origins = lock(&self.origins);
        let Some(origin) = origins.get_mut(key) else {
            return Ok(None);
        };
        if origin.otherwise {
            return Err(PoolError::Otherwise);
        }
        origin.idle.retain(Connection::is_fresh);
        Ok(origin.idle.pop())
    }

    /// Closes the idle connections to the origin of `url`: one of them was found dead, and the others are no younger.
    pub(super) fn forget(&self, url: &Url) {
        if let Some(origin) = lock(&self.origins).get_mut(&origin_of(url)) {
            origin.idle.clear();
        }
    }

    fn note_otherwise(&self, key: String) -> PoolError {
        tracing::debug!(origin = key, "the server does not speak HTTP/1.1");
        let mut origins = lock(&self.origins);
        let origin = origins.entry(key).or_default();
        origin.otherwise = true;
        origin.idle.clear();
        PoolError::Otherwise
    }

    /// One request on one connection; with the error, whether anything of an answer came.
    async fn exchange(
        &self,
        mut connection: Connection,
        key: &str,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<PooledBody>, (hyper::Error, bool)> {
        connection.ready().await.map_err(|error| (error, false))?;
        connection.gauge.begin();
        let response = match connection.send(request).await {
            Ok(response) => response,
            Err(error) => return Err((error, connection.gauge.heard())),
        };
        let length = response.body().size_hint().exact().unwrap_or(0);
        connection.gauge.expect(length);
        let give_back = GiveBack {
            origins: Arc::clone(&self.origins),
            key: key.to_owned(),
            connection,
        };
        let (head, incoming) = response.into_parts();
        let mut body = PooledBody {
            incoming,
            patience: None,
            gauge: Arc::clone(&give_back.connection.gauge),
            connection: Some(give_back),
        };
        body.give_back_at_end();
        Ok(Response::from_parts(head, body))
    }
}

fn origin_of(url: &Url) -> String {
    format!("{}://{}", url.scheme(), address_of(url))
}

/// `None` for what the `http` crate does not take as a target; reqwest has the words for it.
fn request(url: &Url, headers: &HeaderMap) -> Option<Request<Empty<Bytes>>> {
    let uri: Uri = url.as_str().parse().ok()?;
    let target = uri.path_and_query()?.clone();
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = Uri::from(target);
    *request.headers_mut() = headers.clone();
    let host = HeaderValue::from_str(&address_of(url)).ok()?;
    request.headers_mut().insert(HOST, host);
    Some(request)
}

/// A connection on its way back.
#[derive(Debug)]
struct GiveBack {
    origins: Arc<Mutex<HashMap<String, Origin>>>,
    key: String,
    connection: Connection,
}

impl GiveBack {
    fn now(mut self) {
        // `Connection: close` shows as a closed sender, here or when it is taken out again.
        self.connection.since = Instant::now();
        if self.connection.sender.is_closed() {
            return;
        }
        let mut origins = lock(&self.origins);
        let origin = origins.entry(self.key.clone()).or_default();
        origin.idle.retain(Connection::is_fresh);
        if origin.idle.len() < MOST_IDLE {
            origin.idle.push(self.connection);
        }
        if !std::mem::replace(&mut origin.watched, true) {
            tokio::spawn(close_old(Arc::downgrade(&self.origins), self.key));
        }
    }
}

/// Closes the connections to an origin that nobody uses any more, and ends with the last.
async fn close_old(origins: Weak<Mutex<HashMap<String, Origin>>>, key: String) {
    loop {
        sleep(LONGEST_IDLE).await;
        let Some(origins) = origins.upgrade() else {
            return;
        };
        let mut origins = lock(&origins);
        let Some(origin) = origins.get_mut(&key) else {
            return;
        };
        origin.idle.retain(Connection::is_fresh);
        if origin.idle.is_empty() {
            origin.watched = false;
            return;
        }
    }
}

/// A body whose connection goes back to the pool behind its last byte, and is closed when it is dropped before.
#[derive(Debug)]
pub(super) struct PooledBody {
    incoming: Incoming,
    gauge: Arc<Gauge>,
    connection: Option<GiveBack>,
    patience: Option<Pin<Box<Sleep>>>,
}

impl PooledBody {
    fn give_back_at_end(&mut self) {
        if self.incoming.is_end_stream() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.now();
        }
    }
}

impl Body for PooledBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        let incoming = &mut this.incoming;
        let mut next = |cx: &mut Context<'_>| Pin::new(&mut *incoming).poll_frame(cx);
        let frame = match &mut this.connection {
            Some(back) => back.connection.driver.poll(cx, next),
            None => next(cx),
        };
        if let Poll::Ready(frame) = frame {
            this.patience = None;
            match &frame {
                None => this.give_back(),
                Some(Ok(_)) => this.give_back_at_end(),
                Some(Err(_)) => this.connection = None,
            }
            return Poll::Ready(frame);
        }
        if this.gauge.gathers() {
            let patience = this
                .patience
                .get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
            ready!(patience.as_mut().poll(cx));
            this.patience = None;
            this.gauge.relax();
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
