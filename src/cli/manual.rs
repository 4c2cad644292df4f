//! `ocifs man` and `ocifs completions`: from the table of arguments and the table of settings.

use std::fs;
use std::io::{self, Write as _};

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_mangen::Man as Page;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::args::{Cli, Completions, Man};
use super::exit::Exit;
use super::explain::Failure;
use super::{config, output};
use crate::config::SETTINGS;

/// The name of the page about the configuration file.
const FILE_PAGE: &str = "ocifs.toml";
/// Where that file is.
const FILES: [&str; 2] = ["/etc/ocifs/config.toml", "~/.config/ocifs/config.toml"];

pub(super) fn completions(args: &Completions) -> Result<Exit> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ocifs", &mut text);
    write(&text)
}

pub(super) fn run(args: &Man) -> Result<Exit> {
    let Some(dir) = &args.dir else {
        let page = pages()?
            .into_iter()
            .find(|(name, ..)| {
                *name == args.page || name.strip_prefix("ocifs-") == Some(args.page.as_str())
            })
            .ok_or_else(|| {
                Failure::new(Exit::NotFound, format!("there is no page {}", args.page))
            })?;
        return write(&page.2);
    };
    for (name, section, text) in pages()? {
        let dir = dir.join(format!("man{section}"));
        let path = dir.join(format!("{name}.{section}"));
        let write = || fs::create_dir_all(&dir).and_then(|()| fs::write(&path, &text));
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(Exit::Ok)
}

fn write(text: &[u8]) -> Result<Exit> {
    let written = io::stdout().lock().write_all(text);
    written.map_err(output::StdoutError::from)?;
    Ok(Exit::Ok)
}

/// Every page: name, section, roff.
fn pages() -> Result<Vec<(String, u8, Vec<u8>)>> {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    let mut pages = Vec::new();
    add(&root, "ocifs", &mut pages)?;
    pages.push((FILE_PAGE.to_owned(), 5, file_page()?));
    Ok(pages)
}

/// The page of a command, then those of its subcommands.
fn add(command: &Command, name: &str, pages: &mut Vec<(String, u8, Vec<u8>)>) -> Result<()> {
    let mut text = Vec::new();
    // What short help leaves out is wanted here, and the examples as they stand: the crate would fill their lines.
    let examples = command
        .get_after_long_help()
        .or(command.get_after_help())
        .map(ToString::to_string);
    let whole = command
        .clone()
        .name(name.to_owned())
        .mut_args(|argument| argument.hide_short_help(false));
    let page = Page::new(whole);
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    let mut see = Roff::new();
    if let Some(examples) = examples {
        see.control("SH", ["NOTES"]);
        see.control("nf", []);
        for line in examples.lines() {
            see.text([roman(line)]);
        }
        see.control("fi", []);
    }
    see.control("SH", ["SEE ALSO"]);
    let of_root = if name == "ocifs" {
        "ocifs-mount"
    } else {
        "ocifs"
    };
    see.text([bold(of_root), roman("(1), "), bold(FILE_PAGE), roman("(5)")]);
    see.to_writer(&mut text)?;
    pages.push((name.to_owned(), 1, text));
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        add(sub, &format!("{name}-{}", sub.get_name()), pages)?;
    }
    Ok(())
}

/// The page about the configuration file.
fn file_page() -> io::Result<Vec<u8>> {
    let mut page = Roff::new();
    let version = format!("ocifs {}", env!("CARGO_PKG_VERSION"));
    page.control("TH", [FILE_PAGE, "5", "", version.as_str()]);
    page.control("SH", ["NAME"]);
    page.text([roman("ocifs.toml - settings of ocifs")]);
    page.control("SH", ["SYNOPSIS"]);
    for path in FILES {
        page.text([italic(path)]);
        page.control("br", []);
    }
    page.control("SH", ["DESCRIPTION"]);
    page.text([roman(
        "TOML, one key for each setting; all of them can be left out. A key that is none is refused, with the line and the nearest \
         one that is. The same settings can be flags of the commands that they concern, options of a mount (-o, in /etc/fstab too) \
         and variables. Flags win over options, these over variables, variables over the user's file, that over the system's. \
         The file that --config or OCIFS_CONFIG names is read in place of both.",
    )]);
    page.control("PP", []);
    page.text([
        roman("A size is a number of bytes with a unit ("),
        bold("200G"),
        roman(", "),
        bold("512MiB"),
        roman("), a time one of milliseconds to days ("),
        bold("500ms"),
        roman(", "),
        bold("90s"),
        roman(", "),
        bold("1h30m"),
        roman("), or 0. In variables and mount options the values of a list are separated by colons; a number behind one is a port."),
    ]);
    let mut heading = "";
    for setting in SETTINGS {
        if heading != setting.group.heading() {
            heading = setting.group.heading();
            page.control("SH", [heading.to_uppercase().as_str()]);
        }
        page.control("TP", []);
        page.text([
            bold(setting.name),
            roman(" = "),
            italic(config::example(setting)),
        ]);
        page.text([roman(format!("{} {}", setting.about, setting.more))]);
        page.control("br", []);
        page.text([
            roman(format!("Default: {}. Variable: ", setting.default)),
            bold(setting.variable()),
            roman("."),
        ]);
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([
        bold("ocifs"),
        roman("(1), "),
        bold("ocifs-config"),
        roman("(1), "),
        bold("fstab"),
        roman("(5)"),
    ]);
    let mut text = Vec::new();
    page.to_writer(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_every_setting_has_its_place_in_the_manual() {
        let pages = pages().unwrap();
        let text = |name: &str| {
            let page = pages.iter().find(|page| page.0 == name);
            String::from_utf8(page.unwrap_or_else(|| panic!("{name}")).2.clone()).unwrap()
        };
        let file = text(FILE_PAGE);
        for setting in SETTINGS {
            let name = setting.name.replace('-', "\\-");
            assert!(file.contains(&format!("\\fB{name}\\fR")), "{name}");
            assert!(
                text("ocifs-mount").contains(&format!("\\-\\-{name}")),
                "{name}"
            );
        }
        for command in Cli::command().get_subcommands() {
            text(&format!("ocifs-{}", command.get_name()));
        }
        text("ocifs-cache-verify");
    }
}
