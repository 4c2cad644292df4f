//! `ocifs refresh`: every mount asks the registry again.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::args::{Global, Refresh};
use super::exit::Exit;
use super::explain::Failure;
use super::mount::exit_of;
use super::output::{line, printable};
use super::progress::eprint;
use super::{context, status};
use crate::config::Values;
use crate::mount::{self, Request};
use crate::registry::Reference;

/// How long a daemon may take to answer: it asks a registry.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn run(global: &Global, args: &Refresh) -> Result<Exit> {
    let reference: Reference = args.reference.parse()?;
    if reference.digest().is_some() {
        let failure = Failure::new(
            Exit::Usage,
            format!("{reference} names a digest, which never moves"),
        );
        return Err(failure.hint("name a tag").into());
    }
    let settings = context::settings(global, Values::default())?;
    let mounts = status::chosen(args.mountpoint.as_deref())?;
    if mounts.is_empty() {
        let failure = Failure::new(Exit::NotFound, "there is no mount of ocifs");
        return Err(failure
            .hint(
                "`ocifs mount DIR` makes one; without a mount, every pull asks the registry anyway",
            )
            .into());
    }
    let request = Request::Refresh {
        reference: reference.to_string(),
    };
    let mut failed = None;
    for one in &mounts {
        let answer = mount::request(&settings.runtime_dir, one, &request, PATIENCE);
        let answer = answer.map_err(anyhow::Error::from).and_then(told);
        match answer
            .with_context(|| format!("cannot refresh {reference} in {}", one.path.display()))
        {
            Ok(answer) => {
                let digest = printable(answer["digest"].as_str().unwrap_or("?"));
                line(format_args!(
                    "{}: {reference} is {digest}",
                    one.path.display()
                ))?;
            }
            // The other mounts are asked all the same; the first failure is told in full at the end.
            Err(error) if failed.is_none() => failed = Some(error),
            Err(error) => eprint(&format!("warning: {error}")),
        }
    }
    failed.map_or(Ok(Exit::Ok), Err)
}

/// A daemon's answer, or the failure that it tells of.
fn told(answer: Value) -> Result<Value> {
    let Some(error) = answer["error"].as_str() else {
        return Ok(answer);
    };
    let code = answer["exit"]
        .as_u64()
        .and_then(|code| code.try_into().ok());
    let exit = code.and_then(exit_of).unwrap_or(Exit::Failure);
    Err(Failure::new(exit, error).into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::explain::explain;

    #[test]
    fn a_daemon_s_failure_keeps_its_exit_code() {
        assert!(told(json!({ "digest": "sha256:00" })).is_ok());
        let absent = told(json!({ "error": "x.io/m:v1: not found", "exit": 3 })).unwrap_err();
        assert_eq!(explain(&absent).exit, Exit::NotFound);
        let strange = told(json!({ "error": "?", "exit": 77_777 })).unwrap_err();
        assert_eq!(explain(&strange).exit, Exit::Failure);
    }
}
