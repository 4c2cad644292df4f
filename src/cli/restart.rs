//! `ocifs restart`: another process takes a mount over, of the program that is installed now.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::args::{Global, Restart};
use super::exit::Exit;
use super::explain::Failure;
use super::output::line;
use super::{context, status};
use crate::base::Deadline;
use crate::config::{Settings, Values};
use crate::mount::{self, MountInfo, Request};

/// How long a daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long the next one may take to answer.
const UP_BY: Duration = Duration::from_secs(60);

/// How often is looked whether it does.
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(super) fn run(global: &Global, args: &Restart) -> Result<Exit> {
    let settings = context::settings(global, Values::default())?;
    let mounts = status::chosen(args.mountpoint.as_deref())?;
    if mounts.is_empty() {
        return Err(Failure::new(Exit::NotFound, "there is no mount of ocifs").into());
    }
    for one in &mounts {
        let path = one.path.display();
        restart(&settings, one, !args.no_wait).with_context(|| format!("cannot restart {path}"))?;
    }
    Ok(Exit::Ok)
}

fn restart(settings: &Settings, one: &MountInfo, wait: bool) -> Result<()> {
    let ask = |request: &Request| mount::request(&settings.runtime_dir, one, request, PATIENCE);
    let before = ask(&Request::Restart)?;
    if !wait {
        let ended = before["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok());
        return match ended.is_none_or(|pid| mount::process_ends(pid, UP_BY)) {
            true => Ok(()),
            false => {
                Err(Failure::new(Exit::Failure, "the process that serves now does not end").into())
            }
        };
    }
    let deadline = Deadline::after(UP_BY);
    loop {
        // The one that ends does not answer any more, and may let go of who asks.
        if let Ok(after) = ask(&Request::Status)
            && after["pid"] != before["pid"]
        {
            let number = |value: &Value| value.as_u64().unwrap_or(0);
            line(format_args!(
                "{}: process {} goes on from process {}",
                one.path.display(),
                number(&after["pid"]),
                number(&before["pid"])
            ))?;
            return Ok(());
        }
        if deadline.left().is_zero() {
            return Err(
                Failure::new(Exit::Failure, "the next process does not answer")
                    .hint("`ocifs status` tells more")
                    .into(),
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
