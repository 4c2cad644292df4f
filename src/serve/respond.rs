//! One request to one response: the read half of the distribution-spec's API ("Endpoints").

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Body as HttpBody, Frame};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use serde_json::json;

use super::layout::{Index, Layout};
use super::names::{is_repository, is_tag};
use super::range::{Wanted, wanted};
use super::stats::Stats;
use crate::base::{ByteRange, Digest};

/// Bytes read from a blob at a time: all the memory that a response takes.
const PIECE: u64 = 256 << 10;
/// The largest manifest that is served: the size that the distribution-spec asks registries to accept.
const LARGEST_MANIFEST: u64 = 4 << 20;
/// The most tags in one answer; a client asks for the rest with `last`.
const MOST_TAGS: usize = 1000;

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a path asks for. Names, tags and digests are checked here: no later step sees another string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Base,
    Tag { repository: String, tag: String },
    Manifest { repository: String, digest: Digest },
    Blob { digest: Digest },
    Tags { repository: String },
}

/// An error of the distribution-spec ("Error Codes").
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    fn manifest_unknown(reference: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "MANIFEST_UNKNOWN",
            format!("no manifest {reference}"),
        )
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        tracing::warn!(%error, "serve: the layout cannot be read");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            "the layout cannot be read",
        )
    }
}

/// Answers a request.
pub(super) async fn respond<B: HttpBody>(
    layout: Arc<Layout>,
    stats: Stats,
    request: Request<B>,
) -> Response<Body> {
    let head = request.method() == Method::HEAD;
    let result = match *request.method() {
        Method::GET | Method::HEAD => {
            let (parts, _) = request.into_parts();
            // The layout is read with blocking calls, on tokio's threads for those.
            let act = move || answer(&layout, &stats, &parts.uri, &parts.headers, head);
            tokio::task::spawn_blocking(act)
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error).into()))
        }
        _ => {
            let message = "this registry is read-only";
            Err(Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "UNSUPPORTED",
                message,
            ))
        }
    };
    let mut response = result.unwrap_or_else(|refusal| refused(&refusal, head));
    response
        .headers_mut()
        .insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    response
}

fn answer(
    layout: &Layout,
    stats: &Stats,
    uri: &Uri,
    headers: &HeaderMap,
    head: bool,
) -> Result<Response<Body>, Refusal> {
    match route(uri.path())? {
        Route::Base => Ok(json_response(StatusCode::OK, &json!({}), head)),
        Route::Tag { repository, tag } => {
            let index = layout.index()?;
            let digest = index.tag(&repository, &tag);
            let digest =
                digest.ok_or_else(|| Refusal::manifest_unknown(&format!("{repository}:{tag}")))?;
            manifest(layout, &index, digest, headers, head)
        }
        Route::Manifest { digest, .. } => {
            manifest(layout, &*layout.index()?, digest, headers, head)
        }
        Route::Blob { digest } => blob(layout, stats, digest, headers, head),
        Route::Tags { repository } => tags(
            &*layout.index()?,
            &repository,
            uri.query().unwrap_or(""),
            head,
        ),
    }
}

pub(super) fn route(path: &str) -> Result<Route, Refusal> {
    let unknown = || Refusal::new(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such endpoint");
    let rest = path.strip_prefix("/v2").ok_or_else(unknown)?;
    if matches!(rest, "" | "/") {
        return Ok(Route::Base);
    }
    let rest = rest.strip_prefix('/').ok_or_else(unknown)?;
    // The name itself may hold slashes and words like `blobs`: the endpoint is what stands last.
    let (before, last) = rest.rsplit_once('/').ok_or_else(unknown)?;
    let (name, endpoint) = before.rsplit_once('/').ok_or_else(unknown)?;
    if !matches!(
        (endpoint, last),
        ("manifests" | "blobs", _) | ("tags", "list")
    ) {
        return Err(unknown());
    }
    if !is_repository(name) {
        let message = "not a repository name";
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "NAME_INVALID",
            message,
        ));
    }
    let repository = name.to_owned();
    let digest = || {
        let parsed = last.parse::<Digest>();
        parsed.map_err(|error| {
            Refusal::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", error.to_string())
        })
    };
    match endpoint {
        "tags" => Ok(Route::Tags { repository }),
        "blobs" => Ok(Route::Blob { digest: digest()? }),
        _ if is_tag(last) => Ok(Route::Tag {
            repository,
            tag: last.to_owned(),
        }),
        _ => Ok(Route::Manifest {
            repository,
            digest: digest()?,
        }),
    }
}

fn manifest(
    layout: &Layout,
    index: &Index,
    digest: Digest,
    headers: &HeaderMap,
    head: bool,
) -> Result<Response<Body>, Refusal> {
    let unknown = || Refusal::manifest_unknown(&digest.to_string());
    let (file, size) = layout.blob(&digest)?.ok_or_else(unknown)?;
    if size > LARGEST_MANIFEST {
        return Err(unknown());
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0)?;
    let media_type = match index.media_type(&digest) {
        Some(media_type) => media_type.to_owned(),
        None => media_type_inside(&bytes).ok_or_else(unknown)?,
    };
    let media_type = HeaderValue::from_str(&media_type).map_err(|_| unknown())?;
    if matches_etag(headers, &digest) {
        return Ok(finish(not_modified(&digest), empty()));
    }
    let mut response = described(StatusCode::OK, &digest, size, media_type);
    *response.body_mut() = if head { empty() } else { full(bytes) };
    Ok(response)
}

/// The media type of a manifest that no index describes: its own `mediaType`, else told by its fields.
pub(super) fn media_type_inside(bytes: &[u8]) -> Option<String> {
    let document: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    if let Some(media_type) = document.get("mediaType").and_then(|value| value.as_str()) {
        return Some(media_type.to_owned());
    }
    let kind = match (document.get("manifests"), document.get("layers")) {
        (Some(_), None) => "application/vnd.oci.image.index.v1+json",
        (None, Some(_)) => "application/vnd.oci.image.manifest.v1+json",
        _ => return None,
    };
    Some(kind.to_owned())
}

fn blob(
    layout: &Layout,
    stats: &Stats,
    digest: Digest,
    headers: &HeaderMap,
    head: bool,
) -> Result<Response<Body>, Refusal> {
    let unknown = || {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "BLOB_UNKNOWN",
            format!("no blob {digest}"),
        )
    };
    let (file, size) = layout.blob(&digest)?.ok_or_else(unknown)?;
    if matches_etag(headers, &digest) {
        return Ok(finish(not_modified(&digest), empty()));
    }
    let octets = HeaderValue::from_static("application/octet-stream");
    let asked = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok());
    // RFC 9110: Range is for GET alone, and If-Range with another validator means "then all of it".
    let asked = asked.filter(|_| {
        !head
            && headers
                .get(header::IF_RANGE)
                .is_none_or(|tag| tag == &*etag(&digest))
    });
    let (mut response, range) = match wanted(asked, size) {
        Wanted::Whole => (
            described(StatusCode::OK, &digest, size, octets),
            ByteRange::new(0, size),
        ),
        Wanted::Part(range) => {
            let mut response = described(StatusCode::PARTIAL_CONTENT, &digest, range.len(), octets);
            let text = format!("bytes {}-{}/{size}", range.start(), range.end() - 1);
            set(response.headers_mut(), header::CONTENT_RANGE, &text);
            (response, range)
        }
        Wanted::Nothing => {
            let message = format!("the blob has {size} bytes");
            let refusal = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message);
            let mut response = refused(&refusal, head);
            set(
                response.headers_mut(),
                header::CONTENT_RANGE,
                &format!("bytes */{size}"),
            );
            return Ok(response);
        }
    };
    if !head {
        stats.request(digest);
        *response.body_mut() = stream_file(file, range, digest, stats.clone());
    }
    Ok(response)
}

/// `range` of `file`, a piece at a time, each read when the connection has room for it.
fn stream_file(file: File, range: ByteRange, digest: Digest, stats: Stats) -> Body {
    let file = Arc::new(file);
    let pieces = stream::try_unfold(
        (file, range, stats),
        move |(file, left, stats)| async move {
            if left.is_empty() {
                return Ok(None);
            }
            let piece = left.intersect(ByteRange::at(left.start(), PIECE));
            let source = Arc::clone(&file);
            let read = tokio::task::spawn_blocking(move || {
                let mut bytes = vec![0; piece.len() as usize];
                source
                    .read_exact_at(&mut bytes, piece.start())
                    .map(|()| bytes)
            });
            let bytes = read.await.map_err(io::Error::other)??;
            stats.sent(digest, piece.len());
            Ok::<_, io::Error>(Some((
                Frame::data(Bytes::from(bytes)),
                (file, ByteRange::new(piece.end(), left.end()), stats),
            )))
        },
    );
    StreamBody::new(pieces).boxed_unsync()
}

pub(super) fn tags(
    index: &Index,
    repository: &str,
    query: &str,
    head: bool,
) -> Result<Response<Body>, Refusal> {
    let all = index.tags(repository);
    if all.is_empty() {
        let message = format!("no repository {repository}");
        return Err(Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", message));
    }
    let parameter = |key: &str| {
        query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(k, _)| *k == key)
    };
    let most = match parameter("n") {
        None => MOST_TAGS,
        Some((_, number)) => number
            .parse::<usize>()
            .map(|n| n.min(MOST_TAGS))
            .map_err(|_| {
                Refusal::new(
                    StatusCode::BAD_REQUEST,
                    "UNSUPPORTED",
                    "`n` must be a number",
                )
            })?,
    };
    let last = parameter("last").map_or("", |(_, tag)| tag);
    let behind: Vec<&str> = all.into_iter().filter(|tag| *tag > last).collect();
    let page = &behind[..most.min(behind.len())];
    let body = json!({ "name": repository, "tags": page });
    let mut response = json_response(StatusCode::OK, &body, head);
    if let (Some(end), true) = (page.last(), page.len() < behind.len()) {
        let link = format!("</v2/{repository}/tags/list?n={most}&last={end}>; rel=\"next\"");
        set(response.headers_mut(), header::LINK, &link);
    }
    Ok(response)
}

fn etag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

/// Whether If-None-Match names this content (RFC 9110, section 13.1.2; comparison is weak).
fn matches_etag(headers: &HeaderMap, digest: &Digest) -> bool {
    let own = etag(digest);
    let values = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == own)
}

fn not_modified(digest: &Digest) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    set(response.headers_mut(), header::ETAG, &etag(digest));
    response
}

fn described(
    status: StatusCode,
    digest: &Digest,
    length: u64,
    media_type: HeaderValue,
) -> Response<Body> {
    let mut response = finish(Response::new(()), empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, media_type);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    // Content under a digest never changes.
    set(headers, header::ETAG, &etag(digest));
    set(headers, DOCKER_CONTENT_DIGEST, &digest.to_string());
    response
}

fn json_response(status: StatusCode, document: &serde_json::Value, head: bool) -> Response<Body> {
    let bytes = document.to_string();
    let mut response = finish(Response::new(()), empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    if !head {
        *response.body_mut() = full(bytes);
    }
    response
}

fn refused(refusal: &Refusal, head: bool) -> Response<Body> {
    let document = json!({ "errors": [{ "code": refusal.code, "message": refusal.message }] });
    let mut response = json_response(refusal.status, &document, head);
    if refusal.status == StatusCode::METHOD_NOT_ALLOWED {
        response
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

/// Sets a header whose value is made of digests, names and numbers alone.
fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn finish(response: Response<()>, body: Body) -> Response<Body> {
    response.map(|()| body)
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

#[cfg(test)]
#[path = "respond_tests.rs"]
mod tests;
