//! Requests to responses: routes, JSON and server-sent events, refusals.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::super::decoder::Decoder;
use super::super::engine::{Engine, Finish, Outcome, Request};
use super::super::error::Error;
use super::super::load::LoadStats;
use super::super::sample::Sampling;
use super::super::template::Template;
use super::super::text::Text;
use super::ask::{self, Ask, Prompt, Refused};
use super::queue::{Event, Queue};

/// The longest body, in bytes; a prompt that fills any model's context is a fraction of it.
const LONGEST_BODY: usize = 16 << 20;

type Body = BoxBody<Bytes, Infallible>;

/// All that answering needs.
#[derive(Debug)]
pub(super) struct Service {
    queue: Queue,
    text: Arc<Text>,
    template: Option<Arc<Template>>,
    defaults: Sampling,
    room: usize,
    vocabulary: usize,
    loaded: LoadStats,
    model: String,
    created: u64,
    requests: AtomicU64,
}

/// Why there is no answer.
struct Refusal {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = if status.is_server_error() {
            "server_error"
        } else {
            "invalid_request_error"
        };
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    fn document(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        Self {
            param: refused.param,
            ..Self::new(StatusCode::BAD_REQUEST, refused.message)
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = if matches!(error, Error::Request(_)) {
            StatusCode::BAD_REQUEST
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        };
        Self::new(status, error.to_string())
    }
}

/// What an answer says about itself.
#[derive(Clone)]
struct Shape {
    chat: bool,
    id: String,
    created: u64,
    model: String,
}

impl Service {
    pub(super) fn new(engine: Engine, model: String, queue: usize) -> Self {
        let decoder: &Decoder = engine.decoder();
        Self {
            text: Arc::clone(engine.text()),
            template: engine.template().cloned(),
            defaults: engine.defaults().clone(),
            room: engine.room(),
            vocabulary: decoder.config().vocabulary,
            loaded: engine.loaded(),
            model,
            created: seconds(),
            requests: AtomicU64::new(0),
            queue: Queue::start(engine, queue),
        }
    }

    /// Ends what runs and what waits.
    pub(super) fn stop(&self) {
        self.queue.stop();
    }

    pub(super) async fn respond(self: Arc<Self>, request: HttpRequest<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let wanted = match path.as_str() {
            "/v1/completions" | "/v1/chat/completions" => Method::POST,
            "/health" | "/metrics" | "/v1/models" => Method::GET,
            path if path.starts_with("/v1/models/") => Method::GET,
            _ => {
                return refuse(&Refusal::new(
                    StatusCode::NOT_FOUND,
                    format!("there is no {path}"),
                ));
            }
        };
        if *request.method() != wanted
            && !(wanted == Method::GET && *request.method() == Method::HEAD)
        {
            let mut response = refuse(&Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{path} takes {wanted} only"),
            ));
            if let Ok(value) = wanted.as_str().parse() {
                response.headers_mut().insert(ALLOW, value);
            }
            return response;
        }
        match path.as_str() {
            "/health" => document(StatusCode::OK, &json!({ "status": "ok" })),
            "/metrics" => plain(self.metrics()),
            "/v1/models" => document(
                StatusCode::OK,
                &json!({ "object": "list", "data": [self.card()] }),
            ),
            "/v1/completions" => self.generate(request, false).await,
            "/v1/chat/completions" => self.generate(request, true).await,
            path if path
                .strip_prefix("/v1/models/")
                .is_some_and(|name| self.is_called(name)) =>
            {
                document(StatusCode::OK, &self.card())
            }
            path => refuse(&self.no_model(path.trim_start_matches("/v1/models/"))),
        }
    }

    fn card(&self) -> Value {
        json!({ "id": self.model, "object": "model", "created": self.created, "owned_by": "ocifs", "max_model_len": self.room })
    }

    fn is_called(&self, name: &str) -> bool {
        // Clients escape the slashes and colons of a reference.
        name == self.model
            || name
                .replace("%2F", "/")
                .replace("%2f", "/")
                .replace("%3A", ":")
                .replace("%3a", ":")
                .replace("%40", "@")
                == self.model
    }

    fn no_model(&self, name: &str) -> Refusal {
        Refusal {
            code: Some("model_not_found"),
            param: Some("model"),
            ..Refusal::new(
                StatusCode::NOT_FOUND,
                format!("there is no model `{name}` here, only `{}`", self.model),
            )
        }
    }

    async fn generate(
        self: Arc<Self>,
        request: HttpRequest<Incoming>,
        chat: bool,
    ) -> Response<Body> {
        match Arc::clone(&self).begin(request, chat).await {
            Ok((ask, shape, events)) if ask.stream => stream_out(shape, events, ask.include_usage),
            Ok((_, shape, events)) => whole(&shape, events).await,
            Err(refusal) => {
                self.queue.counters.refused.fetch_add(1, Ordering::Relaxed);
                let mut response = refuse(&refusal);
                if refusal.status == StatusCode::SERVICE_UNAVAILABLE {
                    response
                        .headers_mut()
                        .insert(RETRY_AFTER, hyper::header::HeaderValue::from_static("1"));
                }
                response
            }
        }
    }

    async fn begin(
        self: Arc<Self>,
        request: HttpRequest<Incoming>,
        chat: bool,
    ) -> Result<(Ask, Shape, UnboundedReceiver<Event>), Refusal> {
        if request.body().size_hint().lower() > LONGEST_BODY as u64 {
            return Err(too_long());
        }
        let body = Limited::new(request.into_body(), LONGEST_BODY)
            .collect()
            .await
            .map_err(|error| {
                if error.is::<LengthLimitError>() {
                    too_long()
                } else {
                    Refusal::new(
                        StatusCode::BAD_REQUEST,
                        format!("the body did not come: {error}"),
                    )
                }
            })?;
        let body = body.to_bytes();
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let seed = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64)
            ^ (number << 48);
        // A long prompt takes its time to be made into tokens, and others are answered meanwhile.
        let service = Arc::clone(&self);
        let prepared =
            tokio::task::spawn_blocking(move || service.prepare(&body, chat, seed)).await;
        let (ask, request) = prepared.map_err(|error| {
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
        })??;
        let Some(events) = self.queue.ask(request) else {
            return Err(Refusal {
                code: Some("overloaded"),
                ..Refusal::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "too many requests are waiting; try again later",
                )
            });
        };
        let shape = Shape {
            chat,
            id: format!(
                "{}-{:x}-{number}",
                if chat { "chatcmpl" } else { "cmpl" },
                self.created
            ),
            created: seconds(),
            model: self.model.clone(),
        };
        Ok((ask, shape, events))
    }

    fn prepare(&self, body: &[u8], chat: bool, seed: u64) -> Result<(Ask, Request), Refusal> {
        let ask = ask::parse(body, chat, &self.defaults, seed)?;
        if let Some(name) = ask.model.as_deref().filter(|name| *name != self.model) {
            return Err(self.no_model(name));
        }
        let prompt = match &ask.prompt {
            Prompt::Text(text) => self.text.tokens(text, true)?,
            Prompt::Tokens(tokens) => tokens.clone(),
            Prompt::Chat { messages, tools } => {
                let Some(template) = &self.template else {
                    return Err(Refusal::new(
                        StatusCode::BAD_REQUEST,
                        "the model has no chat template; /v1/completions works",
                    ));
                };
                self.text
                    .tokens(&template.render(messages, tools.as_ref())?, false)?
            }
        };
        if let Some(token) = prompt
            .iter()
            .find(|token| **token as usize >= self.vocabulary)
        {
            return Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                format!(
                    "token {token} is not one of the model's {}",
                    self.vocabulary
                ),
            ));
        }
        if prompt.is_empty() {
            return Err(Refusal {
                param: Some("prompt"),
                ..Refusal::new(StatusCode::BAD_REQUEST, "the prompt is empty")
            });
        }
        if prompt.len() >= self.room {
            return Err(Refusal {
                code: Some("context_length_exceeded"),
                ..Refusal::new(
                    StatusCode::BAD_REQUEST,
                    format!(
                        "the prompt has {} tokens, and there is room for {}, the answer included",
                        prompt.len(),
                        self.room
                    ),
                )
            });
        }
        let request = Request {
            prompt,
            most: ask.most,
            sampling: ask.sampling.clone(),
            stops: ask.stops.clone(),
            ignore_ends: false,
        };
        Ok((ask, request))
    }

    fn metrics(&self) -> String {
        let counters = &self.queue.counters;
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, value: String| {
            let _ = writeln!(
                text,
                "# HELP ocifs_run_{name} {help}\n# TYPE ocifs_run_{name} {kind}\nocifs_run_{name} {value}"
            );
        };
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter: &AtomicU64| format!("{}", get(counter) as f64 / 1e6);
        metric(
            "requests_waiting",
            "gauge",
            "Requests in the queue.",
            get(&counters.waiting).to_string(),
        );
        metric(
            "requests_running",
            "gauge",
            "Requests that are being answered.",
            get(&counters.running).to_string(),
        );
        metric(
            "requests_done_total",
            "counter",
            "Requests that were answered.",
            get(&counters.done).to_string(),
        );
        metric(
            "requests_dropped_total",
            "counter",
            "Requests whose client went away.",
            get(&counters.dropped).to_string(),
        );
        metric(
            "requests_failed_total",
            "counter",
            "Requests that failed while they ran.",
            get(&counters.failed).to_string(),
        );
        metric(
            "requests_refused_total",
            "counter",
            "Requests that were refused, full queue included.",
            get(&counters.refused).to_string(),
        );
        metric(
            "requests_overloaded_total",
            "counter",
            "Requests that found the queue full.",
            get(&counters.overloaded).to_string(),
        );
        metric(
            "prompt_tokens_total",
            "counter",
            "Tokens of prompts.",
            get(&counters.prompt_tokens).to_string(),
        );
        metric(
            "reused_tokens_total",
            "counter",
            "Tokens of prompts that were still known.",
            get(&counters.reused_tokens).to_string(),
        );
        metric(
            "generated_tokens_total",
            "counter",
            "Tokens of answers.",
            get(&counters.generated_tokens).to_string(),
        );
        metric(
            "first_token_seconds_total",
            "counter",
            "Time to first tokens, without waiting.",
            seconds(&counters.first_micros),
        );
        metric(
            "answer_seconds_total",
            "counter",
            "Time of whole answers, without waiting.",
            seconds(&counters.total_micros),
        );
        metric(
            "load_seconds",
            "gauge",
            "Time that loading the weights took.",
            self.loaded.time.as_secs_f64().to_string(),
        );
        metric(
            "load_bytes",
            "gauge",
            "Size of the weights.",
            self.loaded.bytes.to_string(),
        );
        text
    }
}

fn too_long() -> Refusal {
    Refusal::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body is longer than {LONGEST_BODY} bytes"),
    )
}

fn seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed()
}

fn document(status: StatusCode, document: &Value) -> Response<Body> {
    let mut response = Response::new(body(document.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}

fn plain(text: String) -> Response<Body> {
    let mut response = Response::new(body(text));
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("text/plain; version=0.0.4"),
    );
    response
}

fn refuse(refusal: &Refusal) -> Response<Body> {
    document(refusal.status, &refusal.document())
}

fn reason(finish: Finish) -> &'static str {
    if finish == Finish::Length {
        "length"
    } else {
        "stop"
    }
}

fn usage(outcome: &Outcome) -> Value {
    json!({
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.tokens.len(),
        "total_tokens": outcome.prompt_tokens + outcome.tokens.len(),
        "prompt_tokens_details": { "cached_tokens": outcome.reused },
    })
}

/// A response with the whole text.
async fn whole(shape: &Shape, mut events: UnboundedReceiver<Event>) -> Response<Body> {
    let mut text = String::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Text(piece) => text += &piece,
            Event::Failed(message) => {
                return refuse(&Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message));
            }
            Event::Done(outcome) if outcome.finish == Finish::Dropped => break,
            Event::Done(outcome) => {
                let choice = if shape.chat {
                    json!({ "index": 0, "message": { "role": "assistant", "content": text, "refusal": null }, "logprobs": null,
                        "finish_reason": reason(outcome.finish) })
                } else {
                    json!({ "index": 0, "text": text, "logprobs": null, "finish_reason": reason(outcome.finish) })
                };
                let object = if shape.chat {
                    "chat.completion"
                } else {
                    "text_completion"
                };
                return document(
                    StatusCode::OK,
                    &json!({ "id": shape.id, "object": object, "created": shape.created, "model": shape.model, "choices": [choice],
                        "usage": usage(&outcome) }),
                );
            }
        }
    }
    refuse(&Refusal::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "the server is stopping",
    ))
}

/// A response that is sent as it is made.
fn stream_out(
    shape: Shape,
    events: UnboundedReceiver<Event>,
    include_usage: bool,
) -> Response<Body> {
    let first = shape.chat.then(|| {
        shape.chunk(
            json!({ "role": "assistant", "content": "" }),
            None,
            include_usage,
        )
    });
    let rest = stream::unfold(Some(events), move |events| {
        let shape = shape.clone();
        async move {
            let mut events = events?;
            let event = events.recv().await;
            Some(shape.pieces(event, events, include_usage))
        }
    });
    let all = stream::iter(first).chain(rest);
    let mut response = Response::new(SyncBody::new(all).boxed());
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("text/event-stream"),
    );
    response.headers_mut().insert(
        CACHE_CONTROL,
        hyper::header::HeaderValue::from_static("no-cache"),
    );
    response
}

/// A body of server-sent events.
struct SyncBody;

impl SyncBody {
    #[allow(clippy::new_ret_no_self)]
    fn new(
        texts: impl Stream<Item = String> + Send + 'static,
    ) -> impl hyper::body::Body<Data = Bytes, Error = Infallible> + Send + Sync + 'static {
        let frames = texts.map(|text| Ok(Frame::data(Bytes::from(text))));
        // hyper polls a body from one place at a time; the lock that makes it shareable is never contended.
        StreamBody::new(Exclusive(std::sync::Mutex::new(Box::pin(frames))))
    }
}

struct Exclusive<S>(std::sync::Mutex<std::pin::Pin<Box<S>>>);

impl<S: Stream> Stream for Exclusive<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let this = self.get_mut();
        this.0
            .get_mut()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .as_mut()
            .poll_next(context)
    }
}

impl Shape {
    fn chunk(&self, content: Value, finish: Option<Finish>, include_usage: bool) -> String {
        let mut choice = if self.chat {
            json!({ "index": 0, "delta": content })
        } else {
            json!({ "index": 0, "text": content })
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = finish.map_or(Value::Null, |finish| json!(reason(finish)));
        let mut chunk = self.frame(json!([choice]));
        if include_usage {
            chunk["usage"] = Value::Null;
        }
        event(&chunk)
    }

    fn frame(&self, choices: Value) -> Value {
        let object = if self.chat {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    /// What one event adds to the stream, and the events that follow, if any do.
    fn pieces(
        &self,
        event_: Option<Event>,
        events: UnboundedReceiver<Event>,
        include_usage: bool,
    ) -> (String, Option<UnboundedReceiver<Event>>) {
        let failed = |message: String| {
            event(&Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message).document())
        };
        match event_ {
            Some(Event::Text(text)) => {
                let content = if self.chat {
                    json!({ "content": text })
                } else {
                    json!(text)
                };
                (self.chunk(content, None, include_usage), Some(events))
            }
            Some(Event::Done(outcome)) if outcome.finish != Finish::Dropped => {
                let content = if self.chat { json!({}) } else { json!("") };
                let mut text = self.chunk(content, Some(outcome.finish), include_usage);
                if include_usage {
                    let mut chunk = self.frame(json!([]));
                    chunk["usage"] = usage(&outcome);
                    text += &event(&chunk);
                }
                (text + "data: [DONE]\n\n", None)
            }
            Some(Event::Failed(message)) => (failed(message), None),
            Some(Event::Done(_)) | None => (failed("the server is stopping".to_owned()), None),
        }
    }
}

fn event(document: &Value) -> String {
    format!("data: {document}\n\n")
}
