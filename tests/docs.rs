//! Commands, mount options and settings that README and `docs/` show are ones that there are.

// Helpers outside of `#[test]` functions are test code too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use ocifs::cli::args::Cli;
use ocifs::config::{SETTINGS, Setting, Values, mount_options};

/// One piece of a document that stands in code.
#[derive(Debug, PartialEq, Eq)]
struct Code {
    /// What a fence says behind its backticks; `None` in a line of text.
    language: Option<String>,
    line: usize,
    text: String,
}

/// Fenced blocks, their lines joined where a backslash ends one, and what stands between backticks elsewhere.
fn code(document: &str) -> Vec<Code> {
    let mut found = Vec::new();
    let mut fence: Option<(String, String)> = None;
    let mut begun: Option<Code> = None;
    for (number, line) in document.lines().enumerate() {
        let trimmed = line.trim_start();
        let ticks: String = trimmed.chars().take_while(|c| *c == '`').collect();
        if let Some((mark, _)) = &fence {
            if ticks == *mark {
                fence = None;
                continue;
            }
        } else if ticks.len() >= 3 {
            let language = trimmed[ticks.len()..].trim().to_owned();
            fence = Some((ticks, language));
            continue;
        }
        let Some((_, language)) = &fence else {
            found.extend(inline(line, number + 1));
            continue;
        };
        let piece = begun.get_or_insert_with(|| Code {
            language: Some(language.clone()),
            line: number + 1,
            text: String::new(),
        });
        match line.strip_suffix('\\') {
            Some(more) => piece.text.push_str(more),
            None => {
                piece.text.push_str(line);
                found.extend(begun.take());
            }
        }
    }
    found
}

/// What stands between backticks; a pipe in a table is written `\|`.
fn inline(line: &str, number: usize) -> Vec<Code> {
    let parts = line.split('`').skip(1).step_by(2);
    let code = |text: &str| Code {
        language: None,
        line: number,
        text: text.replace("\\|", "|"),
    };
    parts.map(code).collect()
}

/// The words of a shell's line, as far as commands in documents go: quotes, comments; each command of a pipe or list by itself.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut all, mut words, mut word): (Vec<Vec<String>>, Vec<String>, Option<String>) =
        Default::default();
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, '|' | '&' | ';' | '(' | ')') => {
                words.extend(word.take());
                all.push(std::mem::take(&mut words));
            }
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    all.push(words);
    all.retain(|words| !words.is_empty());
    all
}

/// The arguments of the `ocifs` in a command, behind `sudo`, variables and a prompt; redirections left out.
fn of_ocifs(words: &[String]) -> Option<Vec<String>> {
    let before =
        |word: &String| ["$", "sudo", "exec", "-"].contains(&word.as_str()) || word.contains('=');
    let start = words.iter().position(|word| !before(word))?;
    let (program, rest) = words[start..].split_first()?;
    // Run from a checkout it is this; a path to it is it.
    let name = Path::new(program).file_name()?.to_str()?;
    let rest = match (name, rest) {
        ("ocifs", rest) => rest,
        ("cargo", [run, .., dashes, _]) if run == "run" && dashes == "--" => {
            &rest[rest.len() - 1..]
        }
        _ => return None,
    };
    let mut arguments = vec!["ocifs".to_owned()];
    let mut skip = false;
    for word in rest {
        match word.trim_start_matches(|c: char| c.is_ascii_digit()) {
            _ if skip => skip = false,
            ">" | ">>" | "<" | ">&" => skip = true,
            redirection if redirection.starts_with(['>', '<']) => {}
            _ => arguments.push(word.clone()),
        }
    }
    Some(arguments)
}

/// What is wrong with a whole command.
fn wrong(arguments: &[String]) -> Option<String> {
    let error = Cli::command().try_get_matches_from(arguments).err()?;
    // Help and version are no mistake.
    (error.exit_code() != 0).then(|| error.to_string())
}

/// What is wrong with a mention: its subcommands and flags, whatever else it says.
fn wrong_mention(arguments: &[String]) -> Option<String> {
    let mut root = Cli::command();
    root.build();
    let mut command = &root;
    let mut words = arguments[1..].iter().peekable();
    while let Some(word) = words.peek().filter(|_| command.has_subcommands()) {
        let is_name = word.chars().all(|c| c.is_ascii_lowercase());
        if !is_name {
            break;
        }
        match command.find_subcommand(word) {
            Some(found) => command = found,
            None => return Some(format!("there is no subcommand {word}")),
        }
        words.next();
    }
    for word in words {
        let Some(flag) = word.strip_prefix("--").filter(|flag| !flag.is_empty()) else {
            continue;
        };
        let flag = flag.split('=').next().unwrap();
        if !command
            .get_arguments()
            .any(|known| known.get_long() == Some(flag))
        {
            return Some(format!("{} has no --{flag}", command.get_name()));
        }
    }
    None
}

fn check(document: &str) -> (usize, Vec<String>) {
    let (mut count, mut mistakes) = (0, Vec::new());
    for code in code(document) {
        let mut say =
            |what: String| mistakes.push(format!("line {}: {}: {what}", code.line, code.text));
        match code.language.as_deref() {
            Some("sh" | "console") => {
                // In a console, what has no prompt is what the command said.
                if code.language.as_deref() == Some("console")
                    && !code.text.trim_start().starts_with(['$', '#'])
                {
                    continue;
                }
                let text = code.text.trim_start().trim_start_matches("# ");
                for arguments in commands(text).iter().filter_map(|words| of_ocifs(words)) {
                    count += 1;
                    wrong(&arguments).into_iter().for_each(&mut say);
                }
            }
            Some("toml") => {
                let key = code
                    .text
                    .split_once('=')
                    .map(|(key, _)| key.trim().trim_start_matches("# "));
                let Some(key) = key.filter(|key| !key.is_empty()) else {
                    continue;
                };
                count += 1;
                if Setting::named(&key.replace('_', "-")).is_none() {
                    say(format!("there is no setting {key}"));
                }
            }
            Some("fstab") => {
                let fields: Vec<&str> = code.text.split_whitespace().collect();
                if let [_, _, "fuse.ocifs" | "ocifs", options, ..] = fields[..] {
                    count += 1;
                    let mut values = Values::default();
                    // The helper of mount(8) makes a flag of this one.
                    let is_setting = |option: &&str| !option.starts_with("config=");
                    for option in mount_options(options).filter(is_setting) {
                        if let Err(error) = values.option(option) {
                            say(error.to_string());
                        }
                    }
                }
            }
            Some(_) => {}
            None => {
                // A word alone is a name; `…` and `|` between alternatives are not typed.
                let text = code.text.replace('…', " ").replace('|', " | ");
                let Some(arguments) = commands(&text).first().and_then(|words| of_ocifs(words))
                else {
                    continue;
                };
                count += 1;
                wrong_mention(&arguments).into_iter().for_each(&mut say);
            }
        }
    }
    (count, mistakes)
}

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut all: Vec<PathBuf> = [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
    ]
    .iter()
    .map(|name| root.join(name))
    .filter(|path| path.exists())
    .collect();
    if let Ok(entries) = fs::read_dir(root.join("docs")) {
        let files = entries.map(|entry| entry.unwrap().path());
        all.extend(files.filter(|path| path.extension().is_some_and(|kind| kind == "md")));
    }
    all
}

#[test]
fn links_within_the_repository_lead_somewhere() {
    let mut count = 0;
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let there = path.parent().unwrap().join(target);
            assert!(there.exists(), "{}: {target}", path.display());
            count += 1;
        }
    }
    assert!(count > 10, "{count} links");
}

#[test]
fn every_command_that_is_shown_can_be_typed() {
    let (mut count, mut mistakes) = (0, Vec::new());
    for path in documents() {
        let (checked, wrong) = check(&fs::read_to_string(&path).unwrap());
        count += checked;
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        mistakes.extend(wrong.into_iter().map(|wrong| format!("{name}, {wrong}")));
    }
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
    assert!(count > 30, "the test does not see what there is: {count}");
}

#[test]
fn a_test_that_a_document_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        for code in code(&text).iter().filter(|code| code.language.is_none()) {
            let named = ["tests/", "systemd/", "packaging/", "benches/"]
                .iter()
                .any(|dir| code.text.starts_with(dir));
            if named && !code.text.contains(char::is_whitespace) {
                count += 1;
                let there = root.join(&code.text).exists();
                assert!(
                    there,
                    "{}, line {}: {} does not exist",
                    path.display(),
                    code.line,
                    code.text
                );
            }
        }
    }
    assert!(count > 0);
}

#[test]
fn mistakes_of_each_kind_are_found() {
    let document = "\
Text with `ocifs mount DIR`, `ocifs muont` and `ocifs pull --jbos 3`, `ocifs cache ls|rm`, `ocifs.toml`.
```sh
sudo OCIFS_OFFLINE=1 ocifs mount /models --allow-other   # fine
ocifs pull a/b \\
    --jobs 3 >log 2>&1 && ocifs umount
ocifs ls 'a b' | ocifs statsu
```
```console
$ ocifs push ./dir r.io/x --fromat docker
ocifs said --this
```
```toml
# a comment
cache-size = '20G'
cache-sise = '20G'
```
```fstab
ocifs /m fuse.ocifs ro,_netdev,x-systemd.automount,cache-size=1G 0 0
ocifs /m fuse.ocifs alow_other 0 0
```
";
    let (count, mistakes) = check(document);
    let lines: Vec<&str> = mistakes
        .iter()
        .map(|mistake| mistake.split(':').next().unwrap())
        .collect();
    assert_eq!(
        lines,
        [
            "line 1", "line 1", "line 4", "line 6", "line 9", "line 15", "line 19"
        ],
        "{mistakes:#?}"
    );
    assert_eq!(count, 14, "{mistakes:#?}");
    assert!(SETTINGS.len() > 10);
}
