//! The command line: parses what was typed, wires the layers together, prints, and ends with a documented code.
//!
//! Stdout, the environment and `anyhow` are used here (and in `config`) and nowhere below.

pub mod args;
mod cache;
mod config;
mod context;
mod demo;
pub mod exit;
mod explain;
pub mod generate;
mod inspect;
mod interrupt;
mod limit;
mod log;
mod login;
mod ls;
mod manual;
mod memory;
mod metrics;
mod mount;
mod mount8;
mod output;
mod overview;
mod progress;
mod prompt;
mod pull;
mod push;
mod refresh;
mod report;
mod restart;
mod run;
mod serve;
mod status;
mod supervise;
mod typed;
mod umount;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use exit::Exit;

/// Runs the command that `arguments` ask for (the program's name first); everything it says goes to stdout and stderr.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(code) = supervise::holder(&arguments) {
        return code;
    }
    match mount8::arguments(&arguments) {
        None => perform(&arguments).into(),
        Some(Ok(translated)) => mount8::exit_code(perform(&translated)).into(),
        Some(Err(text)) => {
            let _ = writeln!(std::io::stderr().lock(), "error: {text}");
            mount8::exit_code(Exit::Usage as u8).into()
        }
    }
}

/// Does what these arguments ask for; the exit code.
fn perform(arguments: &[OsString]) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout and are no error; a reader that left is none either.
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8);
        }
    };
    memory::keep_private();
    memory::one_heap();
    log::init(&cli);
    match dispatch(&cli, arguments) {
        Ok(exit) => exit as u8,
        Err(error) => {
            let explained = explain::explain(&error);
            if let Some(text) = explained.text(&error) {
                let _ = writeln!(std::io::stderr().lock(), "{text}");
            }
            explained.exit as u8
        }
    }
}

fn dispatch(cli: &Cli, arguments: &[OsString]) -> anyhow::Result<Exit> {
    let global = &cli.global;
    match &cli.command {
        Command::Mount(args) => mount::run(global, args, arguments),
        Command::Umount(args) => umount::run(global, args),
        Command::Status(args) => status::run(global, args),
        Command::Refresh(args) => refresh::run(global, args),
        Command::Log(args) => log::run(global, args),
        Command::Restart(args) => restart::run(global, args),
        Command::Cache(command) => cache::run(global, command),
        Command::Ls(args) => ls::run(global, args),
        Command::Inspect(args) => inspect::run(global, args),
        Command::Pull(args) => pull::run(global, args),
        Command::Push(args) => push::run(global, args),
        Command::Serve(args) => serve::run(args),
        Command::Login(args) => login::login(global, args),
        Command::Logout(args) => login::logout(global, args),
        Command::Config(args) => config::run(global, args),
        Command::Completions(args) => manual::completions(args),
        Command::Man(args) => manual::run(args),
        Command::Run(args) => run::run(global, args),
        Command::Demo(args) => demo::run(args),
    }
}
