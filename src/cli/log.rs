//! The log: where messages go, how they look, which there are; and `ocifs log`, which changes that in a mount that runs.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io;
use std::sync::{Mutex, OnceLock};
use std::time::SystemTime;

use anyhow::Result;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use super::args::{self, Cli, Command};
use super::exit::Exit;
use super::{context, status};
use crate::base::lock;
use crate::config::{LogFormat, Settings, Values};
use crate::mount::{self, Request};

/// Messages that are remembered.
const MOST: usize = 20;
/// The longest message that is remembered, in characters.
const LONGEST: usize = 500;

/// What can be changed later.
static CONTROL: OnceLock<(Handle<EnvFilter, Registry>, String)> = OnceLock::new();
/// The last warnings and errors.
static TROUBLES: Mutex<VecDeque<Trouble>> = Mutex::new(VecDeque::new());

/// A warning or an error.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    pub(super) at: SystemTime,
    pub(super) level: &'static str,
    pub(super) text: String,
}

/// Messages go to stderr: warnings, and more for `-v`; the setting `log` wins.
pub(super) fn init(cli: &Cli) {
    // What is wrong with the settings is told by the command.
    let settings = match &cli.command {
        Command::Mount(mount) => mount
            .values()
            .ok()
            .and_then(|values| context::settings(&cli.global, values).ok()),
        _ => None,
    };
    let format = settings
        .as_ref()
        .map_or(LogFormat::Text, |settings| settings.log_format);
    let filter = filter(cli, settings.as_ref());
    let parsed = EnvFilter::try_new(&filter).unwrap_or_else(|_| EnvFilter::new("warn"));
    let (changeable, handle) = reload::Layer::new(parsed);
    let journal = match format {
        LogFormat::Journal => journal(),
        LogFormat::Auto if is_journal() => journal(),
        _ => None,
    };
    let lacks_journal = format == LogFormat::Journal && journal.is_none();
    let written = match (journal, format) {
        (Some(journal), _) => journal.boxed(),
        (None, LogFormat::Json) => {
            let layer = fmt::layer().json().flatten_event(true);
            layer.with_writer(io::stderr).boxed()
        }
        (None, _) => {
            let terminal = rustix::termios::isatty(io::stderr());
            fmt::layer()
                .with_ansi(terminal && std::env::var_os("NO_COLOR").is_none())
                .with_target(false)
                .with_writer(io::stderr)
                .boxed()
        }
    };
    let subscriber = tracing_subscriber::registry()
        .with(written.with_filter(changeable))
        .with(Remember.with_filter(LevelFilter::WARN));
    // A test that runs several commands in one process has set it already.
    if subscriber.try_init().is_ok() {
        let _ = CONTROL.set((handle, filter));
        if lacks_journal {
            tracing::warn!("systemd's journal is not there; messages go to stderr");
        }
    }
}

/// What is logged by a command.
fn filter(cli: &Cli, settings: Option<&Settings>) -> String {
    let set = settings.and_then(|settings| settings.log.clone());
    let asked = set.or_else(|| {
        std::env::var("OCIFS_LOG")
            .ok()
            .filter(|text| !text.is_empty())
    });
    let foreground = matches!(&cli.command, Command::Mount(mount) if mount.foreground);
    asked.unwrap_or_else(|| {
        let level = match cli.global.verbose {
            0 if foreground || matches!(cli.command, Command::Serve(_)) => "warn,ocifs=info",
            0 => "warn",
            1 => "warn,ocifs=info",
            _ => "info,ocifs=debug",
        };
        level.to_owned()
    })
}

/// Whether stderr is systemd's journal (`$JOURNAL_STREAM`, systemd.exec(5)).
fn is_journal() -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stat = rustix::fs::fstat(io::stderr());
    stat.is_ok_and(|stat| told == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Messages for systemd's journal: `journalctl -t ocifs OCIFS_DIGEST=sha256:…`. Nothing where there is none.
fn journal() -> Option<tracing_journald::Layer> {
    let layer = tracing_journald::layer().ok()?;
    Some(
        layer
            .with_field_prefix(Some("OCIFS".to_owned()))
            .with_syslog_identifier("ocifs".to_owned()),
    )
}

/// Keeps warnings and errors for `ocifs status`.
struct Remember;

impl<S: Subscriber> Layer<S> for Remember {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => return,
        };
        let mut text = Text::default();
        event.record(&mut text);
        let mut text = text.message + &text.fields;
        if text.chars().count() > LONGEST {
            text = text.chars().take(LONGEST).collect();
            text.push('…');
        }
        let mut all = lock(&TROUBLES);
        if all.len() == MOST {
            all.pop_front();
        }
        all.push_back(Trouble {
            at: SystemTime::now(),
            level,
            text,
        });
    }
}

/// A message and its fields as one line.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// The last warnings and errors of this process, the latest last.
pub(super) fn troubles() -> Vec<Trouble> {
    lock(&TROUBLES).iter().cloned().collect()
}

/// From now on, what `filter` lets through is logged; without one what was when the process started. What holds then.
pub(super) fn set(filter: Option<&str>) -> Result<String, String> {
    let (handle, started) = CONTROL.get().ok_or("there is no log")?;
    let filter = filter.unwrap_or(started);
    let parsed = EnvFilter::try_new(filter);
    let parsed =
        parsed.map_err(|error| format!("`{filter}` is no filter of log messages: {error}"))?;
    let changed = handle.reload(parsed);
    changed.map_err(|error| format!("the log cannot be changed: {error}"))?;
    Ok(filter.to_owned())
}

pub(super) fn run(global: &args::Global, args: &args::Log) -> Result<Exit> {
    let settings = context::settings(global, Values::default())?;
    for one in status::chosen(args.mountpoint.as_deref())? {
        let request = Request::Log {
            filter: args.filter.clone(),
        };
        let answer = mount::request(&settings.runtime_dir, &one, &request, context::PATIENCE)?;
        let filter = answer["filter"].as_str().unwrap_or("?");
        super::output::line(format_args!("{}: {filter}", one.path.display()))?;
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_remembered_and_what_is_less_is_not() {
        let registry = tracing_subscriber::registry().with(Remember);
        tracing::subscriber::with_default(registry, || {
            tracing::info!("nothing to see");
            tracing::warn!(host = "r.example", "the mirror rests");
            tracing::error!("{}", "é".repeat(2 * LONGEST));
        });
        let all = troubles();
        let warning = all.iter().find(|one| one.text.contains("mirror")).unwrap();
        assert_eq!(
            (warning.level, warning.text.as_str()),
            ("warning", "the mirror rests host=r.example")
        );
        assert!(
            all.iter()
                .any(|one| one.level == "error" && one.text.ends_with("é…"))
        );
        assert!(all.iter().all(|one| !one.text.contains("nothing")));
    }
}
