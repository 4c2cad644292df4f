//! One request on the wire: TLS, plain HTTP where allowed, redirects, time limits. No credentials are chosen here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue,
    LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Method, Response, Url};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::address::{PlainHosts, address_of, host_of, is_loopback, same_origin, shown};
use super::answers::Answers;
use super::certs_d::Trust;
use super::dial::Dialer;
use super::error::chain;
use super::hosts::{Host, Hosts};
use super::pool::{Pool, PoolError};
use super::{HttpVersion, RegistryConfig, RegistryError, tls};
use crate::base::{Instant, Secret, lock};

/// Most addresses whose roots are kept.
const MOST_ROOTS: usize = 256;
/// Most redirects in a row.
const MOST_REDIRECTS: usize = 10;
/// Most bytes of an error's body that are read.
const LONGEST_ERROR: usize = 64 << 10;
/// How long a loopback server may take to answer the question whether it speaks TLS.
const PROBE_TIME: Duration = Duration::from_secs(1);

/// How we introduce ourselves.
pub(super) const NAME: &str = concat!("ocifs/", env!("CARGO_PKG_VERSION"));

/// One request.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) accept: Option<&'static str>,
    /// The value of `Range`.
    pub(super) range: Option<HeaderValue>,
    /// Sent to the origin of `url` only.
    pub(super) authorization: Option<HeaderValue>,
    /// A form to POST.
    pub(super) form: Option<Secret>,
    /// A large body comes back: it gets a connection of its own.
    pub(super) bulk: bool,
    /// Over a connection that has carried nothing before: what is kept may be dead.
    pub(super) fresh: bool,
    /// Further headers, for the origin of `url` only as well.
    pub(super) headers: HeaderMap,
}

impl Ask {
    /// A request without further headers.
    pub(super) fn new(method: Method, url: Url) -> Self {
        Self {
            method,
            url,
            accept: None,
            range: None,
            authorization: None,
            form: None,
            bulk: false,
            fresh: false,
            headers: HeaderMap::new(),
        }
    }
}

/// The answer behind all redirects.
pub(super) struct Answer {
    pub(super) response: Response,
    /// What was asked at last; secret when it is a signed URL.
    pub(super) url: Url,
    /// How long the last hop took to the head of its response.
    pub(super) head: Duration,
    /// Whether there were redirects.
    pub(super) redirected: bool,
    /// Whether they led away from the origin that was asked: its 401 is not the registry's.
    pub(super) foreign: bool,
}

/// What a loopback server was found to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    Tls,
    Plain,
    /// It did not answer to TLS in time, which a busy TLS server may fail to do as well.
    PerhapsPlain,
}

/// The HTTP clients and what is known about servers.
#[derive(Debug)]
pub(super) struct Transport {
    /// For loopback: never through a proxy.
    near_client: reqwest::Client,
    far_client: reqwest::Client,
    /// For large bodies through a proxy.
    far_bulk_client: reqwest::Client,
    /// Makes more of them.
    light: Light,
    /// For large bodies without one; `None` when HTTP/2 is asked for.
    pool: Option<Pool>,
    proxies: Matcher,
    hosts: Hosts,
    plain: PlainHosts,
    /// What loopback servers speak; forgotten when a request to them fails.
    near_speak: Mutex<HashMap<String, Speaks>>,
    /// Of each address its root in the clear and under TLS, where that was needed: every request asks for it.
    roots: Mutex<HashMap<String, [Option<Url>; 2]>>,
    hello: Vec<u8>,
    stall_timeout: Duration,
    answers: Arc<Answers>,
}

/// What the clients for small requests, and for large ones through a proxy, are made with.
#[derive(Debug)]
struct Light {
    trust: rustls::ClientConfig,
    http: HttpVersion,
    connect_timeout: Duration,
}

impl Light {
    /// For loopback or not, and whether for large bodies.
    fn build(&self, near: bool, bulk: bool) -> reqwest::Result<reqwest::Client> {
        let http1 = match self.http {
            HttpVersion::Http1 => true,
            HttpVersion::Auto => bulk,
            HttpVersion::Http2 => false,
        };
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let builder = reqwest::Client::builder()
            .user_agent(NAME)
            .default_headers(headers)
            .redirect(reqwest::redirect::Policy::none())
            // Retries are decided in one place, with the deadline in view.
            .retry(reqwest::retry::never())
            .referer(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            // All streams to a host share one HTTP/2 connection: at 50 ms round trip these windows carry 600 MB/s.
            .http2_initial_stream_window_size(8 << 20)
            .http2_initial_connection_window_size(32 << 20)
            // A connection that died silently must not get the next try of each request that waits on it.
            .http2_keep_alive_interval(Duration::from_secs(5))
            .http2_keep_alive_timeout(Duration::from_secs(5))
            .connect_timeout(self.connect_timeout);
        let builder = if http1 {
            let tls = tls::offering(&self.trust, &["http/1.1"]);
            builder.http1_only().tls_backend_preconfigured(tls)
        } else {
            let tls = tls::offering(&self.trust, &["h2", "http/1.1"]);
            builder.tls_backend_preconfigured(tls)
        };
        let builder = if near { builder.no_proxy() } else { builder };
        builder.build()
    }

    /// As [`Self::build`]; that it fails now and did not before is no reason to fail a request.
    fn make(&self, near: bool, bulk: bool) -> Option<reqwest::Client> {
        self.build(near, bulk).ok()
    }
}

impl Transport {
    /// Reads the CA files and prepares TLS.
    pub(super) fn new(
        config: &RegistryConfig,
        trust: &Trust,
        answers: Arc<Answers>,
    ) -> Result<Self, RegistryError> {
        let setup = |error: reqwest::Error| RegistryError::Setup {
            source: Arc::new(error),
        };
        let authorities = tls::read_authorities(config)?;
        let trust = tls::client(&authorities, trust)?;
        let light = Light {
            trust: trust.clone(),
            http: config.http,
            connect_timeout: config.connect_timeout,
        };
        let dialer = Dialer::new(tls::offering(&trust, &["http/1.1"]), config.connect_timeout);
        Ok(Self {
            near_client: light.build(true, false).map_err(setup)?,
            far_client: light.build(false, false).map_err(setup)?,
            far_bulk_client: light.build(false, true).map_err(setup)?,
            light,
            pool: (config.http != HttpVersion::Http2).then(|| Pool::new(dialer)),
            proxies: Matcher::from_system(),
            hosts: Hosts::new(config.max_connections),
            plain: PlainHosts::new(&config.plain_http),
            near_speak: Mutex::default(),
            roots: Mutex::default(),
            hello: tls::client_hello(),
            stall_timeout: config.stall_timeout,
            answers,
        })
    }

    /// How long a server may send nothing.
    pub(super) fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// What is known about the host at `host[:port]`.
    pub(super) fn host(&self, address: &str) -> Arc<Host> {
        self.hosts.get(address)
    }

    /// Which hosts may be spoken to in the clear.
    pub(super) fn plain(&self) -> &PlainHosts {
        &self.plain
    }

    /// `https://address/` or `http://address/`.
    pub(super) async fn root(&self, address: &str) -> Result<Url, RegistryError> {
        let clear = self.plain.lists(address)
            || (is_loopback(host_of(address)) && self.near_speaks(address).await != Speaks::Tls);
        let mut roots = lock(&self.roots);
        if let Some(root) = roots
            .get(address)
            .and_then(|both| both[usize::from(clear)].clone())
        {
            return Ok(root);
        }
        let scheme = if clear { "http" } else { "https" };
        let root = Url::parse(&format!("{scheme}://{address}/")).map_err(|error| {
            RegistryError::Protocol {
                what: address.to_owned(),
                reason: format!("not an address: {error}"),
            }
        })?;
        if roots.len() >= MOST_ROOTS {
            roots.clear();
        }
        roots.entry(address.to_owned()).or_default()[usize::from(clear)] = Some(root.clone());
        Ok(root)
    }

    /// What a loopback server speaks.
    ///
    /// It is shown the beginning of a TLS handshake, and the first byte of its answer tells: a TLS server sends a
    /// handshake (22) or alert (21) record, whatever its certificate; an HTTP server sees a malformed request line and
    /// answers with text or hangs up. The other way round, plain HTTP first, is less certain: TLS servers answer
    /// it with an HTTP error of their own (Go, nginx) or just close. A real handshake first would take every
    /// certificate problem for plain HTTP.
    async fn near_speaks(&self, address: &str) -> Speaks {
        if let Some(speaks) = self.near().get(address) {
            return *speaks;
        }
        let target = if host_of(address) == address {
            format!("{address}:443")
        } else {
            address.to_owned()
        };
        let probe = async {
            let mut stream = tokio::net::TcpStream::connect(target).await.ok()?;
            stream.write_all(&self.hello).await.ok()?;
            let mut first = [0];
            // An error here is the answer of a server that hung up on us.
            let read = stream.read(&mut first).await.unwrap_or(0);
            let tls = read == 1 && matches!(first[0], 21 | 22);
            Some(if tls { Speaks::Tls } else { Speaks::Plain })
        };
        let speaks = match tokio::time::timeout(PROBE_TIME, probe).await {
            Ok(Some(speaks)) => speaks,
            // Nobody listens; the request will say so.
            Ok(None) => return Speaks::Plain,
            // It reads on and on, as an HTTP server may that waits for an empty line.
            Err(_) => Speaks::PerhapsPlain,
        };
        tracing::debug!(address, ?speaks, "loopback server probed");
        self.near().insert(address.to_owned(), speaks);
        speaks
    }

    fn near(&self) -> MutexGuard<'_, HashMap<String, Speaks>> {
        lock(&self.near_speak)
    }

    /// Sends a request and follows its redirects.
    pub(super) async fn send(&self, ask: &Ask, what: &str) -> Result<Answer, RegistryError> {
        let mut url = ask.url.clone();
        let mut foreign = false;
        for hop in 0..=MOST_REDIRECTS {
            let begun = Instant::now();
            let response = self.hop(ask, &url, !foreign, what).await?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer {
                    response,
                    url,
                    head: begun.elapsed(),
                    redirected: hop > 0,
                    foreign,
                });
            }
            let refuse = |reason: String| RegistryError::Redirect {
                what: what.to_owned(),
                reason,
            };
            if ask.form.is_some() {
                return Err(refuse(
                    "credentials are not sent on to another address".to_owned(),
                ));
            }
            let location = response
                .headers()
                .get(LOCATION)
                .ok_or_else(|| refuse("it has no Location".to_owned()))?
                .to_str()
                .map_err(|_| refuse("its Location is not ASCII".to_owned()))?;
            let next = self.plain.follow(&url, location).map_err(refuse)?;
            drain(response).await;
            url = next;
            // Once away, the credentials stay away: what comes back was chosen by the other host.
            foreign |= !same_origin(&ask.url, &url);
        }
        Err(RegistryError::Redirect {
            what: what.to_owned(),
            reason: format!("more than {MOST_REDIRECTS} redirects in a row, perhaps a loop"),
        })
    }

    async fn hop(
        &self,
        ask: &Ask,
        url: &Url,
        home: bool,
        what: &str,
    ) -> Result<Response, RegistryError> {
        let near = url.host_str().is_some_and(is_loopback);
        let address = address_of(url);
        let host = self.hosts.get(&address);
        if let Some(left) = host.pause() {
            return Err(RegistryError::RateLimited {
                what: what.to_owned(),
                reason: format!("{address} asked for a pause"),
                retry_after: Some(left),
            });
        }
        tracing::trace!(method = %ask.method, url = %shown(url), range = ?ask.range, "request");
        let sending = async {
            #[cfg(test)]
            if let Some(answer) = super::testing::script::answer(ask, url, home, what).await {
                return answer;
            }
            match self.send_bulk(ask, url, near, home, what).await {
                Some(result) => result,
                None => self.send_light(ask, url, near, home, what).await,
            }
        };
        let patience = host.patience_for_head(self.stall_timeout);
        let begun = Instant::now();
        let result = match tokio::time::timeout(patience, sending).await {
            Ok(result) => result,
            Err(_) => {
                host.stalled();
                self.hang_up_on(&host, ask, url, near);
                Err(RegistryError::Timeout {
                    what: what.to_owned(),
                    after: patience,
                })
            }
        };
        if result.is_ok() {
            host.answered(begun.elapsed());
        }
        self.answers.count(match &result {
            Ok(response) => Ok(response.status().as_u16()),
            Err(error) => Err(error),
        });
        match &result {
            Ok(response) => match (response.status().as_u16(), asked_pause(response)) {
                (429, pause) | (503, pause @ Some(_)) => host.refused(pause),
                _ => {}
            },
            Err(RegistryError::Connect { .. }) => host.refused(None),
            Err(_) => {}
        }
        if !near {
            return result;
        }
        match result {
            // What TLS servers say to plain HTTP.
            Ok(response)
                if response.status() == 400
                    && self.near().get(&address_of(url)) == Some(&Speaks::PerhapsPlain) =>
            {
                self.near().remove(&address_of(url));
                Err(RegistryError::Interrupted {
                    what: what.to_owned(),
                    reason: "it was not clear whether the server speaks TLS".to_owned(),
                })
            }
            Ok(response) => Ok(response),
            Err(error) => {
                self.near().remove(&address_of(url));
                Err(error)
            }
        }
    }

    /// Sends a request for bytes of a blob over a connection of our own; `None` when another way has to be taken.
    async fn send_bulk(
        &self,
        ask: &Ask,
        url: &Url,
        near: bool,
        home: bool,
        what: &str,
    ) -> Option<Result<Response, RegistryError>> {
        let pool = self.pool.as_ref()?;
        if ask.method != Method::GET || self.proxied(url, near) {
            return None;
        }
        // A few bytes are not worth a handshake, but without TLS reqwest would need a connection of its own for them as well.
        let few = || ask.range.is_some() && (url.scheme() == "http" || pool.has_idle(url));
        if !ask.bulk && !few() {
            return None;
        }
        let mut headers = match home {
            true => ask.headers.clone(),
            false => HeaderMap::new(),
        };
        headers.insert(reqwest::header::USER_AGENT, HeaderValue::from_static(NAME));
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(range) = &ask.range {
            headers.insert(RANGE, range.clone());
        }
        if let Some(accept) = ask.accept {
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
        }
        if let Some(authorization) = ask.authorization.as_ref().filter(|_| home) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        match pool.get(url, &headers, ask.fresh).await {
            Ok(response) => Some(Ok(response.map(reqwest::Body::wrap).into())),
            Err(PoolError::Otherwise) => None,
            Err(error) => Some(Err(RegistryError::from_pool(what, &address_of(url), error))),
        }
    }

    /// Uses no connection to a host again that may be dead: one of them was.
    fn hang_up_on(&self, host: &Host, ask: &Ask, url: &Url, near: bool) {
        if let Some(pool) = &self.pool {
            pool.forget(url);
        }
        let through_proxy = ask.bulk && self.proxied(url, near);
        host.renew(usize::from(through_proxy), || {
            self.light.make(near, through_proxy)
        });
    }

    /// Whether a proxy stands between us and a server.
    fn proxied(&self, url: &Url, near: bool) -> bool {
        let uri = || url.as_str().parse().ok();
        !near && uri().is_some_and(|uri| self.proxies.intercept(&uri).is_some())
    }

    /// Sends a request by reqwest.
    async fn send_light(
        &self,
        ask: &Ask,
        url: &Url,
        near: bool,
        home: bool,
        what: &str,
    ) -> Result<Response, RegistryError> {
        let through_proxy = ask.bulk && self.proxied(url, near);
        let host = self.hosts.get(&address_of(url));
        let kind = usize::from(through_proxy);
        if ask.fresh {
            host.renew(kind, || self.light.make(near, through_proxy));
        }
        let renewed = host.client(kind);
        let client = match (&renewed, near, through_proxy) {
            (Some(client), _, _) => client,
            (None, true, _) => &self.near_client,
            (None, false, true) => &self.far_bulk_client,
            (None, false, false) => &self.far_client,
        };
        let mut request = client.request(ask.method.clone(), url.clone());
        if home {
            request = request.headers(ask.headers.clone());
        }
        if let Some(accept) = ask.accept {
            request = request.header(ACCEPT, accept);
        }
        if let Some(range) = &ask.range {
            request = request.header(RANGE, range);
        }
        if let Some(authorization) = ask.authorization.as_ref().filter(|_| home) {
            request = request.header(AUTHORIZATION, authorization);
        }
        if let Some(form) = &ask.form {
            request = request
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.expose().to_owned());
        } else if ask.method == Method::POST {
            // Some servers want to be told that there is nothing.
            request = request.header(CONTENT_LENGTH, 0);
        }
        let sent = request.send().await;
        sent.map_err(|error| RegistryError::from_transport(what, &address_of(url), error))
    }

    /// Sends content to one address. Nobody is followed elsewhere with it, and how long it may take is the caller's to say.
    pub(super) async fn upload(
        &self,
        ask: &Ask,
        content: reqwest::Body,
        what: &str,
    ) -> Result<Answer, RegistryError> {
        let near = ask.url.host_str().is_some_and(is_loopback);
        let address = address_of(&ask.url);
        let host = self.hosts.get(&address);
        if let Some(left) = host.pause() {
            return Err(RegistryError::RateLimited {
                what: what.to_owned(),
                reason: format!("{address} asked for a pause"),
                retry_after: Some(left),
            });
        }
        let client = if near {
            &self.near_client
        } else {
            &self.far_client
        };
        let mut request = client
            .request(ask.method.clone(), ask.url.clone())
            .headers(ask.headers.clone())
            .body(content);
        if let Some(authorization) = &ask.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let begun = Instant::now();
        match request.send().await {
            Ok(response) => {
                if matches!(response.status().as_u16(), 429 | 503)
                    && let Some(pause) = asked_pause(&response)
                {
                    host.refused(Some(pause));
                }
                Ok(Answer {
                    response,
                    url: ask.url.clone(),
                    head: begun.elapsed(),
                    redirected: false,
                    foreign: false,
                })
            }
            Err(error) => {
                if near {
                    self.near().remove(&address);
                }
                Err(RegistryError::from_transport(what, &address, error))
            }
        }
    }

    /// A body of at most `limit` bytes; what Content-Length says is only a hint.
    pub(super) async fn read(
        &self,
        response: &mut Response,
        limit: usize,
        what: &str,
    ) -> Result<Bytes, RegistryError> {
        let too_large = || RegistryError::TooLarge {
            what: what.to_owned(),
            limit: limit as u64,
        };
        if response
            .content_length()
            .is_some_and(|length| length > limit as u64)
        {
            return Err(too_large());
        }
        let mut body = BytesMut::new();
        while let Some(piece) = self.piece(response, what).await? {
            if body.len() + piece.len() > limit {
                return Err(too_large());
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// The next piece of a body.
    pub(super) async fn piece(
        &self,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<Bytes>, RegistryError> {
        next_piece(response, self.stall_timeout, what).await
    }

    /// Turns an answer that is no success into its error. The body of a 416 is never read: some servers announce
    /// more than they send.
    pub(super) async fn refusal(
        &self,
        mut answer: Answer,
        what: &str,
        host: &str,
    ) -> RegistryError {
        let status = answer.response.status().as_u16();
        let retry_after = asked_pause(&answer.response);
        let mut body = Vec::new();
        if status != 416 {
            while body.len() < LONGEST_ERROR
                && let Ok(Some(piece)) = self.piece(&mut answer.response, what).await
            {
                body.extend_from_slice(&piece[..piece.len().min(LONGEST_ERROR - body.len())]);
            }
        }
        RegistryError::from_status(what, host, status, retry_after, &body)
    }
}

/// Reads the short body of an answer whose head was all that mattered: an HTTP/1.1 connection with unread bytes is lost.
pub(super) async fn drain(mut response: Response) {
    const SHORT: u64 = 16 << 10;
    const PATIENCE: Duration = Duration::from_millis(200);
    let read = async {
        let mut read = 0;
        while read <= SHORT
            && let Ok(Some(piece)) = response.chunk().await
        {
            read += piece.len() as u64;
        }
    };
    // Whatever comes of it: the worst is another connection.
    let _ = tokio::time::timeout(PATIENCE, read).await;
}

/// The next piece of a body, `None` at its end; the server may take `stall_timeout` for it.
pub(super) async fn next_piece(
    response: &mut Response,
    stall_timeout: Duration,
    what: &str,
) -> Result<Option<Bytes>, RegistryError> {
    match tokio::time::timeout(stall_timeout, response.chunk()).await {
        Ok(Ok(piece)) => Ok(piece),
        Ok(Err(error)) => Err(RegistryError::Interrupted {
            what: what.to_owned(),
            reason: chain(&error.without_url()),
        }),
        Err(_) => Err(RegistryError::Timeout {
            what: what.to_owned(),
            after: stall_timeout,
        }),
    }
}

/// How long a response asks us to wait.
fn asked_pause(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    super::retry::retry_after(value, SystemTime::now())
}
