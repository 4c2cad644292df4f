//! What `ocifs status` shows people, from what mounts answer. Whatever is missing in an answer of another version is left out.

use std::time::Duration;

use serde_json::Value;

use super::output::{Align, lay_out, printable};
use crate::base::ByteSize;

/// Troubles that are shown.
const MOST_TROUBLES: usize = 5;
/// The width of a bar, in characters.
const BAR: usize = 20;

/// All mounts; with what they said some time ago also what moved since.
pub(super) fn describe(answers: &[Value], before: Option<(&[Value], Duration)>) -> Vec<String> {
    let mut lines = Vec::new();
    for (at, answer) in answers.iter().enumerate() {
        if at > 0 {
            lines.push(String::new());
        }
        // Of another process the numbers begin anew.
        let same = |other: &&Value| {
            other["mountpoint"] == answer["mountpoint"] && other["pid"] == answer["pid"]
        };
        let earlier = before.and_then(|(answers, since)| Some((answers.iter().find(same)?, since)));
        mount(answer, earlier, &mut lines);
    }
    lines
}

fn mount(answer: &Value, before: Option<(&Value, Duration)>, lines: &mut Vec<String>) {
    lines.push(text(&answer["mountpoint"]));
    if let Some(error) = answer["error"].as_str() {
        return lines.push(format!("  {}", printable(error)));
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
    lines.push(format!("  kept by {keeper}{pid}{taken}"));
    let way = match answer["passthrough"].as_bool() {
        Some(true) => "verified blobs are read by the kernel itself",
        _ => "all reads go through this process",
    };
    lines.push(format!(
        "  process {}, version {}, up {}; {way}",
        answer["pid"],
        text(&answer["version"]),
        span(number(&answer["upSeconds"]))
    ));
    let cache = &answer["cache"];
    lines.push(format!(
        "  cache {}: {} of {}",
        text(&cache["dir"]),
        bytes(&cache["allocated"]),
        bytes(&cache["limit"])
    ));
    if let Some(trouble) = cache["trouble"].as_str() {
        lines.push(format!("  NOT USED: {}", printable(trouble)));
    }
    if answer["openToAll"] == true {
        lines.push(
            "  every local user can read whatever its credentials open; `allow` bounds it"
                .to_owned(),
        );
    }
    moved(answer, before, lines);
    models(answer, before, lines);
    blobs(answer, lines);
    wrong(answer, lines);
    let troubles = list(&answer["troubles"]);
    for trouble in troubles.iter().rev().take(MOST_TROUBLES).rev() {
        lines.push(format!(
            "  {} {} ago: {}",
            text(&trouble["level"]),
            span(number(&trouble["agoSeconds"])),
            text(&trouble["text"])
        ));
    }
}

/// What was read and what came.
fn moved(answer: &Value, before: Option<(&Value, Duration)>, lines: &mut Vec<String>) {
    let (Some(cached), Some(fetched)) = (
        answer["reads"]["cachedBytes"].as_u64(),
        answer["reads"]["fetchedBytes"].as_u64(),
    ) else {
        return;
    };
    let rate = |at: fn(&Value) -> &Value| {
        let (earlier, since) = before?;
        let grown = number(at(answer)).saturating_sub(number(at(earlier)));
        Some(format!(" ({}/s)", ByteSize(per_second(grown, since))))
    };
    let received = rate(|answer| &answer["registry"]["receivedBytes"]).unwrap_or_default();
    lines.push(format!(
        "  registries sent {}{received}",
        bytes(&answer["registry"]["receivedBytes"])
    ));
    let all = cached.saturating_add(fetched);
    if let Some(here) = cached.saturating_mul(100).checked_div(all) {
        let failed = match number(&answer["reads"]["failed"]) {
            0 => String::new(),
            count => format!("; {count} reads FAILED"),
        };
        lines.push(format!(
            "  read through this process {}, {here} % of it was here{failed}",
            ByteSize(all)
        ));
    }
}

fn models(answer: &Value, before: Option<(&Value, Duration)>, lines: &mut Vec<String>) {
    let rows = list(&answer["models"]).iter().map(|model| {
        let open = match number(&model["open"]) {
            0 => "not open".to_owned(),
            count => format!("{count} open"),
        };
        let progress = before.and_then(|(earlier, since)| {
            let same = |other: &&Value| {
                other["reference"] == model["reference"] && other["digest"] == model["digest"]
            };
            let earlier = list(&earlier["models"]).iter().find(same)?;
            let grown = number(&model["cached"]).saturating_sub(number(&earlier["cached"]));
            let missing = number(&model["size"]).saturating_sub(number(&model["cached"]));
            let rate = per_second(grown, since);
            let bar = bar(&model["cached"], &model["size"]);
            Some(match missing.checked_div(rate) {
                Some(seconds) if missing > 0 => {
                    format!("{bar} {}/s, {} left", ByteSize(rate), span(seconds))
                }
                _ => bar,
            })
        });
        [
            format!("  {}", text(&model["reference"])),
            percent(&model["cached"], &model["size"]),
            bytes(&model["size"]),
            open,
            progress.unwrap_or_default(),
        ]
    });
    let align = [
        Align::Left,
        Align::Right,
        Align::Right,
        Align::Left,
        Align::Left,
    ];
    lines.extend(lay_out(align, &rows.collect::<Vec<_>>()));
}

fn blobs(answer: &Value, lines: &mut Vec<String>) {
    let unfinished = list(&answer["blobs"]).iter();
    let unfinished = unfinished.filter(|blob| blob["verified"] != "yes");
    let rows = unfinished.map(|blob| {
        let state = match blob["verified"] == "no" {
            true => "CORRUPT: reads fail",
            false => "not verified yet",
        };
        [
            format!("  {}", short(&blob["digest"])),
            percent(&blob["cached"], &blob["size"]),
            bytes(&blob["size"]),
            state.to_owned(),
        ]
    });
    let align = [Align::Left, Align::Right, Align::Right, Align::Left];
    lines.extend(lay_out(align, &rows.collect::<Vec<_>>()));
}

fn wrong(answer: &Value, lines: &mut Vec<String>) {
    for wrong in list(&answer["wrong"]) {
        let from: Vec<_> = list(&wrong["from"]).iter().map(text).collect();
        let from = match from.is_empty() {
            true => "an earlier run".to_owned(),
            false => from.join(", "),
        };
        let outcome = match wrong["lasting"].as_bool() {
            Some(true) => "wrong again: reads fail",
            _ => "thrown away and fetched again; who had read it may have read wrong bytes",
        };
        lines.push(format!(
            "  {} came WRONG from {from}, {} ago; {outcome}",
            short(&wrong["digest"]),
            span(number(&wrong["agoSeconds"]))
        ));
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn text(value: &Value) -> String {
    printable(value.as_str().unwrap_or("?"))
}

fn bytes(value: &Value) -> String {
    ByteSize(number(value)).to_string()
}

/// The beginning of a digest, enough to find it by.
fn short(digest: &Value) -> String {
    text(digest).chars().take(19).collect()
}

fn per_second(grown: u64, since: Duration) -> u64 {
    (grown as f64 / since.as_secs_f64().max(1e-3)) as u64
}

fn percent(part: &Value, whole: &Value) -> String {
    let (part, whole) = (number(part), number(whole));
    let percent = part.saturating_mul(100).checked_div(whole);
    format!("{} % of", percent.unwrap_or(100))
}

fn bar(part: &Value, whole: &Value) -> String {
    let (part, whole) = (number(part), number(whole));
    let full = part.saturating_mul(BAR as u64).checked_div(whole);
    let full = full.map_or(BAR, |full| usize::try_from(full).unwrap_or(BAR).min(BAR));
    format!("[{}{}]", "#".repeat(full), ".".repeat(BAR - full))
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
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_of_another_version_does_not_break_the_table() {
        assert_eq!(percent(&json!(5), &json!(10)), "50 % of");
        assert_eq!(percent(&Value::Null, &Value::Null), "100 % of");
        assert_eq!(
            (span(5), span(600), span(90_000)),
            ("5 s".into(), "10 min".into(), "25 h".into())
        );
        assert!(!describe(&[json!({}), json!({"models": 5})], None).is_empty());
    }

    #[test]
    fn what_moved_is_shown_as_a_rate_with_what_is_left() {
        let at = |cached: u64, pid: u32| {
            json!({
                "mountpoint": "/models",
                "pid": pid,
                "reads": { "cachedBytes": 1, "fetchedBytes": 3, "failed": 0 },
                "registry": { "receivedBytes": cached },
                "models": [{ "reference": "r.example/m:v1", "digest": "d", "cached": cached, "size": 100 << 20, "open": 1 }],
            })
        };
        let (earlier, now) = ([at(20 << 20, 7)], [at(40 << 20, 7)]);
        let lines = describe(&now, Some((&earlier, Duration::from_secs(2)))).join("\n");
        assert!(
            lines.contains("registries sent 40.0 MiB (10.0 MiB/s)"),
            "{lines}"
        );
        assert!(lines.contains("25 % of it was here"), "{lines}");
        assert!(
            lines.contains("[########............] 10.0 MiB/s, 6 s left"),
            "{lines}"
        );
        let other = [at(20 << 20, 8)];
        let lines = describe(&now, Some((&other, Duration::from_secs(2)))).join("\n");
        assert!(!lines.contains("/s"), "another process began anew: {lines}");
    }
}
