//! The `ocifs` command.

fn main() -> std::process::ExitCode {
    ocifs::cli::run(std::env::args_os())
}
