//! `ocifs config`: every setting, its value and where that comes from; and a file to start from.

use std::fmt::Write as _;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::args::{Config, Global};
use super::exit::Exit;
use super::output::{self, Align, line, printable, table};
use super::{context, limit, memory};
use crate::base::ByteSize;
use crate::config::{SETTINGS, Settings, Takes};
use crate::mount::{self, Request};

/// A setting in force.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Row {
    name: String,
    value: String,
    /// Where it was given; nothing for a default.
    from: Option<String>,
}

pub(super) fn run(global: &Global, args: &Config) -> Result<Exit> {
    if args.template {
        line(template().trim_end())?;
        return Ok(Exit::Ok);
    }
    let settings = context::settings(global, args.settings.with_options(&args.options)?)?;
    let rows = match &args.of {
        None => rows(&settings),
        Some(point) => {
            let found = mount::find(point)?;
            let dir = &settings.runtime_dir;
            let answer = mount::request(dir, &found, &Request::Config, context::PATIENCE)?;
            serde_json::from_value(answer)?
        }
    };
    if args.json {
        output::json(&rows)?;
        return Ok(Exit::Ok);
    }
    let rows: Vec<[String; 3]> = rows
        .into_iter()
        .map(|row| {
            let from = row.from.unwrap_or_else(|| "default".to_owned());
            [row.name, printable(&row.value), printable(&from)]
        })
        .collect();
    table([Align::Left; 3], &rows)?;
    Ok(Exit::Ok)
}

/// Every setting, in the order of the table.
pub(super) fn rows(settings: &Settings) -> Vec<Row> {
    let mut given = settings.given.given().peekable();
    let rows = SETTINGS.iter().map(|setting| {
        let name = setting.name.to_owned();
        match given.next_if(|(one, ..)| one.name == setting.name) {
            Some((_, values, origin)) => Row {
                name,
                value: values.join(", "),
                from: Some(origin.to_string()),
            },
            None => Row {
                value: measured(settings, &name).unwrap_or_else(|| setting.default.to_owned()),
                name,
                from: None,
            },
        }
    });
    rows.collect()
}

/// Defaults that depend on the machine.
fn measured(settings: &Settings, name: &str) -> Option<String> {
    Some(match name {
        "cache-dir" => settings.cache_dir.display().to_string(),
        "runtime-dir" => settings.runtime_dir.display().to_string(),
        "cache-size" => ByteSize(limit::default(&settings.cache_dir).ok()?).to_string(),
        "memory" => ByteSize(memory::default()).to_string(),
        _ => return None,
    })
}

/// A configuration file that says nothing yet, and what it could say.
pub(super) fn template() -> String {
    let mut text = String::from(
        "# Settings of ocifs; see ocifs.toml(5). Every one can also be a flag (--cache-size 200G), a mount option\n\
         # (-o cache-size=200G) or a variable (OCIFS_CACHE_SIZE=200G). What a line that is commented out says is an example.\n",
    );
    let mut heading = "";
    for setting in SETTINGS {
        if heading != setting.group.heading() {
            heading = setting.group.heading();
            let _ = write!(text, "\n## {heading}\n");
        }
        text.push('\n');
        let words = [setting.about, setting.more].join(" ");
        let words = format!("{} Default: {}.", words.trim(), setting.default);
        for line in fold(&words, 110) {
            let _ = writeln!(text, "# {line}");
        }
        let _ = writeln!(text, "#{} = {}", setting.name, example(setting));
    }
    text
}

/// A value that could be set, as TOML.
pub(super) fn example(setting: &crate::config::Setting) -> String {
    let one = match (setting.name, setting.takes) {
        (_, Takes::Switch) => return (setting.default != "yes").to_string(),
        (_, Takes::Word(words)) => words.last().copied().unwrap_or_default(),
        ("cache-size", _) => "200G",
        ("plain-http", _) => "registry.lan:5000",
        ("ca-file", _) => "/etc/ssl/own-ca.pem",
        ("hosts-dir", _) => "/etc/containerd/certs.d",
        ("auth-file", _) => "/etc/ocifs/auth.json",
        ("platform", _) => "linux/arm64",
        ("max-connections", _) => "8",
        ("uid" | "gid", _) => "1000",
        ("umask", _) => "027",
        ("log", _) => "info",
        ("metrics", _) => "127.0.0.1:9464",
        ("allow", _) => "ghcr.io/org/*",
        ("deny", _) => "**/secret-*",
        (_, Takes::Size) => "128MiB",
        (_, Takes::Time) => "1m",
        (_, Takes::Dir) => "/srv/ocifs",
        (_, Takes::File | Takes::Text(_)) => "…",
    };
    match setting.many {
        true => format!("[\"{one}\"]"),
        false => format!("\"{one}\""),
    }
}

/// Words in lines of at most `width` characters, unless one is longer.
fn fold(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Surroundings, Values};

    fn surroundings(file: &std::path::Path) -> Surroundings<'static> {
        Surroundings {
            variable: &|name| (name == "HOME").then(|| "/home/x".into()),
            user: 1000,
            directory: "/".into(),
            system_file: file.to_owned(),
        }
    }

    #[test]
    fn the_template_says_nothing_and_each_of_its_examples_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let resolve = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Settings::resolve(Values::default(), None, &surroundings(&file)).unwrap()
        };
        let silent = resolve(&template());
        assert!(rows(&silent).iter().all(|row| row.from.is_none()));
        let spoken = template().replace("\n#", "\n").replace("\n #", "\n#");
        let spoken: String = spoken
            .lines()
            .filter(|line| line.contains(" = ") && !line.starts_with([' ', '#']))
            .map(|line| format!("{line}\n"))
            .collect();
        let rows = rows(&resolve(&spoken));
        assert_eq!(rows.len(), SETTINGS.len());
        for (at, row) in rows.iter().enumerate() {
            let line = format!("{}:{}", file.display(), at + 1);
            assert_eq!(row.from.as_deref(), Some(line.as_str()), "{}", row.name);
        }
    }

    /// The settings as docs/configuration.md has them.
    fn reference() -> String {
        let (mut text, mut heading) = (String::new(), "");
        for setting in SETTINGS {
            if heading != setting.group.heading() {
                heading = setting.group.heading();
                let _ = write!(
                    text,
                    "\n## {heading}\n\n| Setting | Value | Default | |\n|---|---|---|---|\n"
                );
            }
            let value = match setting.takes {
                Takes::Switch => "yes, no".to_owned(),
                Takes::Word(words) => words.join(", "),
                _ => setting.value_name(),
            };
            let words = [setting.about, setting.more].join(" ");
            let many = if setting.many { "; a list" } else { "" };
            let _ = writeln!(
                text,
                "| `{}` | {value}{many} | {} | {} |",
                setting.name,
                setting.default,
                words.trim().replace('|', "\\|")
            );
        }
        text
    }

    #[test]
    fn docs_of_settings_are_those_of_the_table() {
        const MARK: &str = "<!-- made from src/config/table.rs -->\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, made) = text.split_once(MARK).unwrap();
        if std::env::var_os("OCIFS_UPDATE_DOCS").is_some() {
            return std::fs::write(path, [before, MARK, &reference()].concat()).unwrap();
        }
        assert_eq!(
            made,
            reference(),
            "OCIFS_UPDATE_DOCS=1 cargo test --lib docs_"
        );
    }

    #[test]
    fn lines_break_between_words() {
        assert_eq!(fold("a bb  ccc d", 4), ["a bb", "ccc", "d"]);
        assert!(template().lines().all(|line| line.chars().count() <= 140));
    }
}
