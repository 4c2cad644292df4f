//! `ocifs status`: what the mounts say about themselves.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::args::{Global, Status};
use super::exit::Exit;
use super::output::{Align, line, printable, table};
use super::{context, output};
use crate::base::ByteSize;
use crate::config::{Settings, Values};
use crate::mount::{self, MountInfo, Request};

pub(super) fn run(global: &Global, args: &Status) -> Result<Exit> {
    let settings = context::settings(global, Values::default())?;
    let mounts = chosen(args.mountpoint.as_deref())?;
    let answers: Vec<Value> = mounts.iter().map(|one| ask(&settings, one)).collect();
    if args.json {
        output::json(&json!({ "mounts": answers }))?;
        return Ok(Exit::Ok);
    }
    if answers.is_empty() {
        line("no mounts; `ocifs mount DIR` makes one")?;
    }
    for (at, answer) in answers.iter().enumerate() {
        if at > 0 {
            line("")?;
        }
        print(answer)?;
    }
    Ok(Exit::Ok)
}

/// The mount at a path, or all of ours.
pub(super) fn chosen(path: Option<&Path>) -> Result<Vec<MountInfo>> {
    match path {
        Some(path) => Ok(vec![mount::find(path)?]),
        None => mount::mounts().context("cannot read the table of mounts"),
    }
}

/// What a mount says; where its daemon cannot be asked, why.
fn ask(settings: &Settings, one: &MountInfo) -> Value {
    let mut answer = match mount::request(
        &settings.runtime_dir,
        one,
        &Request::Status,
        context::PATIENCE,
    ) {
        Ok(answer) => answer,
        Err(error) => {
            // The message that tells most is the last one: no such socket, permission denied.
            let error = anyhow::Error::from(error);
            json!({ "error": error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ") })
        }
    };
    answer["mountpoint"] = json!(one.path);
    answer
}

fn print(answer: &Value) -> Result<()> {
    let text = |value: &Value| printable(value.as_str().unwrap_or("?"));
    let bytes = |value: &Value| ByteSize(value.as_u64().unwrap_or(0)).to_string();
    line(text(&answer["mountpoint"]))?;
    if let Some(error) = answer["error"].as_str() {
        line(format_args!("  {}", printable(error)))?;
        return Ok(());
    }
    let keeper = text(&answer["keeper"]["by"]);
    let pid = answer["keeper"]["pid"].as_u64();
    let pid = pid
        .map(|pid| format!(", process {pid}"))
        .unwrap_or_default();
    let times = answer["takenOver"]["times"].as_u64().unwrap_or(0);
    let taken = match times {
        0 => String::new(),
        times => format!(
            "; taken over {times} times, at last because: {}",
            text(&answer["takenOver"]["why"])
        ),
    };
    line(format_args!("  kept by {keeper}{pid}{taken}"))?;
    let cache = &answer["cache"];
    line(format_args!(
        "  process {}, version {}, up {}",
        answer["pid"],
        text(&answer["version"]),
        span(answer["upSeconds"].as_u64().unwrap_or(0))
    ))?;
    line(format_args!(
        "  cache {}: {} of {}",
        text(&cache["dir"]),
        bytes(&cache["allocated"]),
        bytes(&cache["limit"])
    ))?;
    if let Some(trouble) = cache["trouble"].as_str() {
        line(format_args!("  NOT USED: {}", printable(trouble)))?;
    }
    let none = Vec::new();
    let models = answer["models"].as_array().unwrap_or(&none);
    let rows: Vec<[String; 4]> = models
        .iter()
        .map(|model| {
            let open = match model["open"].as_u64().unwrap_or(0) {
                0 => "not open".to_owned(),
                count => format!("{count} open"),
            };
            let percent = percent(&model["cached"], &model["size"]);
            [
                "  ".to_owned() + &text(&model["reference"]),
                percent,
                bytes(&model["size"]),
                open,
            ]
        })
        .collect();
    table(
        [Align::Left, Align::Right, Align::Right, Align::Left],
        &rows,
    )?;
    let blobs = answer["blobs"].as_array().unwrap_or(&none);
    let unfinished = blobs.iter().filter(|blob| blob["verified"] != "yes");
    let rows: Vec<[String; 4]> = unfinished
        .map(|blob| {
            let digest: String = text(&blob["digest"]).chars().take(19).collect();
            let state = if blob["verified"] == "no" {
                "CORRUPT: reads fail"
            } else {
                "not verified yet"
            };
            [
                format!("  {digest}"),
                percent(&blob["cached"], &blob["size"]),
                bytes(&blob["size"]),
                state.to_owned(),
            ]
        })
        .collect();
    table(
        [Align::Left, Align::Right, Align::Right, Align::Left],
        &rows,
    )?;
    for wrong in answer["wrong"].as_array().unwrap_or(&none) {
        let digest: String = text(&wrong["digest"]).chars().take(19).collect();
        let from: Vec<_> = wrong["from"]
            .as_array()
            .unwrap_or(&none)
            .iter()
            .map(text)
            .collect();
        let from = match from.is_empty() {
            true => "an earlier run".to_owned(),
            false => from.join(", "),
        };
        let outcome = match wrong["lasting"].as_bool() {
            Some(true) => "wrong again: reads fail",
            _ => "thrown away and fetched again; who had read it may have read wrong bytes",
        };
        let ago = span(wrong["agoSeconds"].as_u64().unwrap_or(0));
        line(format_args!(
            "  {digest} came WRONG from {from}, {ago} ago; {outcome}"
        ))?;
    }
    Ok(())
}

fn percent(part: &Value, whole: &Value) -> String {
    let (part, whole) = (part.as_u64().unwrap_or(0), whole.as_u64().unwrap_or(0));
    format!(
        "{} % of",
        part.saturating_mul(100).checked_div(whole).unwrap_or(100)
    )
}

/// A span as people say it.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_version_does_not_break_the_table() {
        assert_eq!(percent(&json!(5), &json!(10)), "50 % of");
        assert_eq!(percent(&Value::Null, &Value::Null), "100 % of");
        assert_eq!(
            (span(5), span(600), span(90_000)),
            ("5 s".into(), "10 min".into(), "25 h".into())
        );
    }
}
