//! Metrics of a mount in Prometheus' text format, and a health check, over HTTP.
//!
//! Names follow <https://prometheus.io/docs/practices/naming/>: base units, `_total` for what only grows. No label has a value that
//! readers or registries choose, so that nobody can make series without end.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use tokio::net::TcpListener;

use super::report::Report;
use crate::base::meter::Durations;
use crate::blob::Verified;
use crate::fuse::operation_name;
use crate::http;

/// How long a busy address is waited for before the next try.
const PAUSE: Duration = Duration::from_millis(200);

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric.
#[derive(Clone, Copy, Debug)]
struct Metric {
    name: &'static str,
    kind: Kind,
    /// Its label and that one's values, for people; empty without.
    label: &'static str,
    help: &'static str,
    read: fn(&Report, &mut Samples<'_>),
}

/// Every metric, in the order in which they are told; docs/metrics.md has the same table.
const METRICS: &[Metric] = &[
    Metric {
        name: "ocifs_build_info",
        kind: Kind::Gauge,
        label: "version",
        help: "1, with the version of the program.",
        read: |_, out| out.labelled("version", env!("CARGO_PKG_VERSION"), 1),
    },
    Metric {
        name: "ocifs_start_time_seconds",
        kind: Kind::Gauge,
        label: "",
        help: "When this process began to serve the mount, in seconds since 1970.",
        read: |report, out| {
            let start = SystemTime::now() - report.life.start.elapsed();
            let since = start.duration_since(SystemTime::UNIX_EPOCH);
            out.plain(since.unwrap_or_default().as_secs());
        },
    },
    Metric {
        name: "ocifs_takeovers",
        kind: Kind::Gauge,
        label: "",
        help: "Processes that have served this mount before this one; counters begin anew with each.",
        read: |report, out| out.plain(report.life.times),
    },
    Metric {
        name: "ocifs_fuse_requests_total",
        kind: Kind::Counter,
        label: "operation: lookup, open, read, …",
        help: "Requests of the kernel. What it reads itself (passthrough, its page cache) makes none.",
        read: |report, out| {
            for (number, count) in report.counts.get().map(|all| all.all()).unwrap_or_default() {
                if let Some(name) = operation_name(number) {
                    out.labelled("operation", name, count);
                }
            }
        },
    },
    Metric {
        name: "ocifs_fuse_errors_total",
        kind: Kind::Counter,
        label: "errno: the number; 2 is a name that is not there, 5 EIO, 110 a time-out",
        help: "Requests of the kernel that were answered with an error.",
        read: |report, out| {
            for (number, count) in report
                .counts
                .get()
                .map(|all| all.errors())
                .unwrap_or_default()
            {
                out.labelled("errno", number, count);
            }
        },
    },
    Metric {
        name: "ocifs_open_files",
        kind: Kind::Gauge,
        label: "",
        help: "Files and directories that are open in the mount.",
        read: |report, out| out.plain(report.tree.open_handles()),
    },
    Metric {
        name: "ocifs_read_bytes_total",
        kind: Kind::Counter,
        label: "source: cache, registry",
        help: "Bytes that the daemon answered reads with: at once, or after waiting for a registry.",
        read: |report, out| {
            out.labelled("source", "cache", report.meter.cached());
            out.labelled("source", "registry", report.meter.fetched());
        },
    },
    Metric {
        name: "ocifs_read_failures_total",
        kind: Kind::Counter,
        label: "",
        help: "Reads that were answered with an error.",
        read: |report, out| out.plain(report.meter.failed()),
    },
    Metric {
        name: "ocifs_read_wait_seconds",
        kind: Kind::Histogram,
        label: "",
        help: "How long reads waited whose bytes were not in the cache.",
        read: |report, out| out.durations(report.meter.waits()),
    },
    Metric {
        name: "ocifs_registry_requests_total",
        kind: Kind::Counter,
        label: "outcome: 1xx, 2xx, 3xx, 4xx, 5xx, failed",
        help: "Requests to registries, mirrors and where they redirect to, by how they ended; failed: without a status.",
        read: |report, out| {
            for (outcome, count) in report.blobs.registry().answers().all() {
                out.labelled("outcome", outcome, count);
            }
        },
    },
    Metric {
        name: "ocifs_registry_received_bytes_total",
        kind: Kind::Counter,
        label: "",
        help: "Bytes of blobs that came from registries.",
        read: |report, out| out.plain(report.blobs.received()),
    },
    Metric {
        name: "ocifs_registry_hedges_total",
        kind: Kind::Counter,
        label: "",
        help: "Requests that were made a second time because the first was slow.",
        read: |report, out| out.plain(report.blobs.hedges()),
    },
    Metric {
        name: "ocifs_references",
        kind: Kind::Gauge,
        label: "state: open, idle",
        help: "References (tags, digests) that the mount shows, by whether something below them is open.",
        read: |report, out| {
            let bound = report.tree.bound();
            let open = bound.iter().filter(|one| one.open > 0).count();
            out.labelled("state", "open", open);
            out.labelled("state", "idle", bound.len() - open);
        },
    },
    Metric {
        name: "ocifs_blobs",
        kind: Kind::Gauge,
        label: "state: verified, partial, wrong",
        help: "Blobs in use: whole and right, still coming or not checked, with a wrong digest.",
        read: |report, out| {
            let live = report.blobs.live();
            let count = |wanted: fn(&Verified) -> bool| {
                live.iter().filter(|blob| wanted(&blob.verified())).count()
            };
            out.labelled("state", "verified", count(|is| matches!(is, Verified::Yes)));
            out.labelled(
                "state",
                "partial",
                count(|is| matches!(is, Verified::NotYet)),
            );
            out.labelled(
                "state",
                "wrong",
                count(|is| matches!(is, Verified::No { .. })),
            );
        },
    },
    Metric {
        name: "ocifs_wrong_blobs",
        kind: Kind::Gauge,
        label: "",
        help: "Blobs that came with a wrong digest, as far as they are remembered: the last ones.",
        read: |report, out| out.plain(report.blobs.wrong().len()),
    },
    Metric {
        name: "ocifs_hashed_bytes_total",
        kind: Kind::Counter,
        label: "",
        help: "Bytes of blobs whose SHA-256 was computed.",
        read: |report, out| out.plain(report.blobs.hash_cost().bytes),
    },
    Metric {
        name: "ocifs_hash_cpu_seconds_total",
        kind: Kind::Counter,
        label: "",
        help: "Processor time that this took.",
        read: |report, out| out.plain(report.blobs.hash_cost().processor.as_secs_f64()),
    },
    Metric {
        name: "ocifs_memory_used_bytes",
        kind: Kind::Gauge,
        label: "",
        help: "Memory for bytes under way.",
        read: |report, out| out.plain(report.blobs.memory().0),
    },
    Metric {
        name: "ocifs_memory_limit_bytes",
        kind: Kind::Gauge,
        label: "",
        help: "The setting `memory`.",
        read: |report, out| out.plain(report.blobs.config().memory),
    },
    Metric {
        name: "ocifs_cache_allocated_bytes",
        kind: Kind::Gauge,
        label: "",
        help: "Bytes that the cache's files take on their disk.",
        read: |report, out| out.plain(report.blobs.cache().usage().allocated),
    },
    Metric {
        name: "ocifs_cache_limit_bytes",
        kind: Kind::Gauge,
        label: "",
        help: "The setting `cache-size`.",
        read: |report, out| out.plain(report.blobs.cache().usage().limit),
    },
    Metric {
        name: "ocifs_cache_healthy",
        kind: Kind::Gauge,
        label: "",
        help: "1 while the cache can be used, 0 while its disk is full or fails and reads go to the registry.",
        read: |report, out| out.plain(u8::from(report.blobs.cache().trouble().is_none())),
    },
    Metric {
        name: "ocifs_passthrough",
        kind: Kind::Gauge,
        label: "",
        help: "1 where the kernel reads verified blobs without the daemon.",
        read: |report, out| out.plain(u8::from(report.tree.has_passthrough())),
    },
];

/// Takes a metric's values.
#[derive(Debug)]
struct Samples<'a> {
    name: &'static str,
    text: &'a mut String,
}

impl Samples<'_> {
    fn plain(&mut self, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{} {value}", self.name);
    }

    /// `is` is a value of ours: nothing in it has to be escaped.
    fn labelled(&mut self, label: &str, is: impl std::fmt::Display, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{}{{{label}=\"{is}\"}} {value}", self.name);
    }

    fn durations(&mut self, durations: &Durations) {
        let name = self.name;
        let mut sum = 0;
        let bounds = Durations::BOUNDS.iter().map(ToString::to_string);
        for (bound, count) in bounds.chain(["+Inf".to_owned()]).zip(durations.counts()) {
            sum += count;
            let _ = writeln!(self.text, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(
            self.text,
            "{name}_sum {}\n{name}_count {sum}",
            durations.sum()
        );
    }
}

/// All metrics as text.
fn render(report: &Report) -> String {
    let mut text = String::new();
    for metric in METRICS {
        let (name, kind) = (metric.name, metric.kind.name());
        let label = match metric.label {
            "" => String::new(),
            label => format!(" By {label}."),
        };
        let _ = writeln!(
            text,
            "# HELP {name} {}{label}\n# TYPE {name} {kind}",
            metric.help
        );
        (metric.read)(
            report,
            &mut Samples {
                name,
                text: &mut text,
            },
        );
    }
    text
}

/// Answers on `address` from now on, in the background. An address that is taken is waited for, up to `patience`: then that is in the log.
///
/// # Errors
/// Without patience, when the address cannot be had.
pub(super) async fn serve(
    address: SocketAddr,
    report: Arc<Report>,
    patience: Duration,
) -> Result<()> {
    let listener = TcpListener::bind(address).await;
    if let Err(error) = &listener
        && !patience.is_zero()
    {
        tracing::info!(%address, %error, "metrics wait for their address");
        tokio::spawn(async move {
            let end = tokio::time::Instant::now() + patience;
            loop {
                tokio::time::sleep(PAUSE).await;
                match TcpListener::bind(address).await {
                    Ok(listener) => return accept(listener, report).await,
                    Err(error) if tokio::time::Instant::now() > end => {
                        return tracing::error!(%address, %error, "there are no metrics");
                    }
                    Err(_) => {}
                }
            }
        });
        return Ok(());
    }
    let listener = listener.with_context(|| format!("cannot listen on {address} for metrics"))?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "metrics");
    }
    tokio::spawn(accept(listener, report));
    Ok(())
}

async fn accept(listener: TcpListener, report: Arc<Report>) {
    let respond = move |request| {
        let answer = respond(&request, &report);
        async move { answer }
    };
    http::serve(listener, respond, std::future::pending()).await;
}

fn respond<B>(request: &Request<B>, report: &Report) -> Response<Full<Bytes>> {
    let answer = |status: StatusCode, kind: &'static str, text: String| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        let kind = hyper::header::HeaderValue::from_static(kind);
        response.headers_mut().insert(CONTENT_TYPE, kind);
        response
    };
    let plain = "text/plain; charset=utf-8";
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = answer(
            StatusCode::METHOD_NOT_ALLOWED,
            plain,
            "GET or HEAD\n".into(),
        );
        let methods = hyper::header::HeaderValue::from_static("GET, HEAD");
        refused.headers_mut().insert(ALLOW, methods);
        return refused;
    }
    match request.uri().path() {
        "/metrics" => {
            let text = render(report);
            answer(
                StatusCode::OK,
                "text/plain; version=0.0.4; charset=utf-8",
                text,
            )
        }
        // That this is answered says that the daemon runs. A cache that fails makes reads slower, not wrong.
        "/health" => {
            let text = match report.blobs.cache().trouble() {
                None => "ok\n".to_owned(),
                Some(trouble) => format!("ok, but the cache is not used: {trouble}\n"),
            };
            answer(StatusCode::OK, plain, text)
        }
        _ => answer(
            StatusCode::NOT_FOUND,
            plain,
            "/metrics, /health\n".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions_and_the_documentation_has_all_of_them() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        let documentation = std::fs::read_to_string(path).unwrap();
        for metric in METRICS {
            let name = metric.name;
            assert!(name.starts_with("ocifs_"), "{name}");
            assert_eq!(
                metric.kind == Kind::Counter,
                name.ends_with("_total"),
                "{name}"
            );
            let row = format!(
                "| `{name}` | {} | {} | {} |",
                metric.kind.name(),
                metric.label,
                metric.help
            );
            assert!(documentation.contains(&row), "{row}");
        }
        let rows = documentation
            .lines()
            .filter(|line| line.starts_with("| `ocifs_"));
        assert_eq!(rows.count(), METRICS.len());
    }

    #[test]
    fn the_dashboard_asks_for_metrics_that_there_are() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/grafana.json");
        let text = std::fs::read_to_string(path).unwrap();
        let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let targets = panels
            .iter()
            .flat_map(|panel| panel["targets"].as_array().unwrap());
        let mut asked = 0;
        for target in targets {
            let query = target["expr"].as_str().unwrap();
            let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for word in words.filter(|word| word.starts_with("ocifs_")) {
                let name = word.strip_suffix("_bucket").unwrap_or(word);
                assert!(METRICS.iter().any(|metric| metric.name == name), "{query}");
                asked += 1;
            }
        }
        assert!(asked > 10, "{asked}");
    }

    #[test]
    fn a_histogram_adds_up() {
        let durations = Durations::default();
        durations.observe(Duration::from_millis(2));
        durations.observe(Duration::from_secs(60));
        let mut text = String::new();
        let mut samples = Samples {
            name: "x",
            text: &mut text,
        };
        samples.durations(&durations);
        assert!(text.contains("x_bucket{le=\"0.003\"} 1\n"), "{text}");
        assert!(
            text.ends_with("x_bucket{le=\"+Inf\"} 2\nx_sum 60.002\nx_count 2\n"),
            "{text}"
        );
    }
}
