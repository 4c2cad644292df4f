//! Servers that are a function: what would go over a socket is asked of a closure on the same thread. With tokio's clock
//! stopped, a test of any length of waiting takes no time and always goes the same way.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use reqwest::{Response, Url};
use tokio::time::{Sleep, sleep};

use crate::registry::RegistryError;
use crate::registry::address::address_of;
use crate::registry::transport::Ask;

/// What is asked of a scripted server.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    /// `host[:port]`.
    pub(crate) host: String,
    /// Path and query.
    pub(crate) target: String,
    /// First byte and the one behind the last.
    pub(crate) range: Option<(u64, u64)>,
    /// The value of `Authorization`.
    pub(crate) authorization: Option<String>,
}

/// What a scripted server does.
#[derive(Clone, Debug)]
pub(crate) enum Said {
    /// Takes no connection.
    Refused,
    /// Closes the connection without a word.
    HungUp,
    /// Never answers.
    Silence,
    /// Answers.
    Answer {
        status: u16,
        headers: Vec<(&'static str, String)>,
        /// Before the head comes.
        delay: Duration,
        body: Vec<Step>,
    },
}

/// What comes of a body, in order.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Bytes(Bytes),
    Wait(Duration),
    /// Nothing more, and the connection stays open.
    Stall,
    /// The connection breaks.
    Break,
}

type Script = Rc<dyn Fn(&Asked) -> Said>;

thread_local! {
    static SCRIPT: RefCell<Option<Script>> = const { RefCell::new(None) };
}

/// Has all requests of this thread answered by `script` until the guard is dropped.
pub(crate) fn play(script: impl Fn(&Asked) -> Said + 'static) -> Playing {
    SCRIPT.with(|slot| *slot.borrow_mut() = Some(Rc::new(script)));
    Playing(())
}

/// See [`play`].
#[derive(Debug)]
pub(crate) struct Playing(());

impl Drop for Playing {
    fn drop(&mut self) {
        SCRIPT.with(|slot| *slot.borrow_mut() = None);
    }
}

/// Whether a script answers on this thread.
pub(in crate::registry) fn is_playing() -> bool {
    SCRIPT.with(|slot| slot.borrow().is_some())
}

/// The script's answer, if there is one on this thread.
pub(in crate::registry) async fn answer(
    ask: &Ask,
    url: &Url,
    home: bool,
    what: &str,
) -> Option<Result<Response, RegistryError>> {
    let said = said(ask, url, home)?;
    Some(carry_out(said, url, what).await)
}

fn said(ask: &Ask, url: &Url, home: bool) -> Option<Said> {
    let script = SCRIPT.with(|slot| slot.borrow().clone())?;
    let text = |value: &reqwest::header::HeaderValue| value.to_str().unwrap().to_owned();
    let range = ask.range.as_ref().map(text).and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
    });
    let query = url.query().map(|query| format!("?{query}"));
    Some(script(&Asked {
        host: address_of(url),
        target: url.path().to_owned() + &query.unwrap_or_default(),
        range,
        authorization: ask.authorization.as_ref().filter(|_| home).map(text),
    }))
}

async fn carry_out(said: Said, url: &Url, what: &str) -> Result<Response, RegistryError> {
    let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    match said {
        Said::Refused => Err(RegistryError::Connect {
            host: address_of(url),
            source: Arc::new(refused),
        }),
        Said::HungUp => Err(RegistryError::Interrupted {
            what: what.to_owned(),
            reason: "hung up".to_owned(),
        }),
        Said::Silence => std::future::pending().await,
        Said::Answer {
            status,
            headers,
            delay,
            body,
        } => {
            sleep(delay).await;
            let mut head = hyper::Response::builder().status(status);
            for (name, value) in headers {
                head = head.header(name, value);
            }
            let body = Playback {
                steps: body.into(),
                wait: None,
            };
            Ok(head.body(reqwest::Body::wrap(body)).unwrap().into())
        }
    }
}

/// A body as the script has it.
struct Playback {
    steps: VecDeque<Step>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl Body for Playback {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        loop {
            if let Some(wait) = &mut self.wait {
                ready!(wait.as_mut().poll(cx));
                self.wait = None;
            }
            match self.steps.pop_front() {
                None => return Poll::Ready(None),
                Some(Step::Bytes(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Some(Step::Wait(time)) => self.wait = Some(Box::pin(sleep(time))),
                Some(Step::Stall) => {
                    self.steps.push_front(Step::Stall);
                    return Poll::Pending;
                }
                Some(Step::Break) => {
                    let error = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }
}
