//! Credential helpers: programs named `docker-credential-NAME` that keep logins (docker/docker-credential-helpers, "Usage").
//!
//! A helper is a program of its own that talks to keychains and clouds. It may hang, print what it likes, or be missing: every talk
//! is bounded in time and bytes, never goes through a shell, and ends with the helper and what it started.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::credentials::Credentials;
use super::error::bounded;
use crate::base::{Secret, lock};

/// How long a helper may take. Those of clouds ask a server; a lookup waits for 20 s in all.
const PATIENCE: Duration = Duration::from_secs(15);
/// A failure that took less may be repeated at once.
const QUICK: Duration = Duration::from_secs(1);
/// A helper that failed slowly is not asked again for so many times the time that it took.
const SLOW: u32 = 4;
/// Most bytes that a helper may say.
const LONGEST_ANSWER: u64 = 64 << 10;
/// Longest name of a helper, without its prefix.
const LONGEST_NAME: usize = 64;
/// What a helper says, with a failing exit status, when it keeps nothing for a server.
const NOT_FOUND: &str = "credentials not found in native keychain";

/// What a helper answered about a server: a login, or that it has none.
type Answer = Result<Option<Credentials>, String>;

/// One helper and server: its last answer, and the last login it gave.
#[derive(Default)]
struct Asked {
    last: Option<Last>,
    last_login: Option<Credentials>,
}

struct Last {
    begun: Instant,
    took: Duration,
    failed: bool,
    answer: Answer,
}

impl Last {
    /// Whether it answers a question of the moment `asked`: it was begun since, or the helper failed slowly a moment ago. One that hangs
    /// would hold up every new repository.
    fn answers(&self, asked: Instant) -> bool {
        let slow = self.failed && self.took >= QUICK;
        self.begun >= asked || slow && asked < self.begun + self.took * SLOW
    }
}

/// The helpers of this process. Of several that want the same login at the same time one asks.
#[derive(Default)]
pub(super) struct Helpers {
    asked: Mutex<HashMap<(String, String), Arc<Entry>>>,
}

/// Its lock is held while the helper runs.
type Entry = tokio::sync::Mutex<Asked>;

impl std::fmt::Debug for Helpers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Helpers")
    }
}

impl Helpers {
    /// The login that the helper of this name keeps for a server. The error is a sentence about the helper.
    ///
    /// A helper that fails after it has given a login is not believed to have lost it: the login goes on being used, and the registry
    /// decides. A read that runs for hours outlives many a failure of a cloud's metadata server.
    pub(super) async fn get(&self, name: &str, server: &str) -> Answer {
        let program = program(name)?;
        let asked = Instant::now();
        let entry = lock(&self.asked)
            .entry((name.to_owned(), server.to_owned()))
            .or_default()
            .clone();
        let mut entry = entry.lock().await;
        if let Some(last) = entry.last.as_ref().filter(|last| last.answers(asked)) {
            return last.answer.clone();
        }
        let begun = Instant::now();
        let mut answer = get(OsStr::new(&program), server, PATIENCE).await;
        let (took, failed) = (begun.elapsed(), answer.is_err());
        match &answer {
            Ok(found) => entry.last_login = found.clone(),
            Err(reason) => {
                tracing::warn!(server, reason, "credential helper failed");
                if let Some(login) = &entry.last_login {
                    answer = Ok(Some(login.clone()));
                }
            }
        }
        entry.last = Some(Last {
            begun,
            took,
            failed,
            answer: answer.clone(),
        });
        answer
    }
}

/// `docker-credential-NAME`. The name comes from a file and becomes a program to run: letters, digits, `.`, `_` and `-` alone.
fn program(name: &str) -> Result<String, String> {
    let good = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if good {
        Ok(format!("docker-credential-{name}"))
    } else {
        Err(format!(
            "`{}` is no name of a credential helper",
            bounded(name, 80)
        ))
    }
}

async fn get(program: &OsStr, server: &str, patience: Duration) -> Answer {
    let said = talk(program, "get", server.as_bytes(), patience).await?;
    if !said.success {
        return if said.is_not_found() {
            Ok(None)
        } else {
            Err(said.complaint(program, "get"))
        };
    }
    let (username, secret) = login(&said.stdout)
        .ok_or_else(|| format!("{} does not answer in JSON", program.to_string_lossy()))?;
    match (username.is_empty(), secret.expose().is_empty()) {
        (_, true) => Ok(None),
        (true, false) => Err(format!(
            "{} gives a secret without a user name",
            program.to_string_lossy()
        )),
        (false, false) => Ok(Some(Credentials::login(username, secret))),
    }
}

/// What `get` prints. serde_json's message is left out: it may quote the secret.
pub(super) fn login(printed: &[u8]) -> Option<(String, Secret)> {
    #[derive(serde::Deserialize)]
    struct Login {
        #[serde(rename = "Username")]
        username: String,
        #[serde(rename = "Secret")]
        secret: String,
    }
    let login: Login = serde_json::from_slice(printed).ok()?;
    Some((login.username, Secret::new(login.secret)))
}

/// Gives a login to a helper to keep.
pub(super) async fn store(
    name: &str,
    server: &str,
    username: &str,
    password: &Secret,
) -> Result<(), String> {
    let program = program(name)?;
    let login = serde_json::json!({
        "ServerURL": server, "Username": username, "Secret": password.expose(),
    });
    let login = Secret::new(login.to_string());
    let program = OsStr::new(&program);
    let said = talk(program, "store", login.expose().as_bytes(), PATIENCE).await?;
    if said.success {
        return Ok(());
    }
    Err(said.complaint(program, "store"))
}

/// Tells a helper to forget a login; whether it had one.
pub(super) async fn erase(name: &str, server: &str) -> Result<bool, String> {
    let program = program(name)?;
    let program = OsStr::new(&program);
    let said = talk(program, "erase", server.as_bytes(), PATIENCE).await?;
    if said.success {
        Ok(true)
    } else if said.is_not_found() {
        Ok(false)
    } else {
        Err(said.complaint(program, "erase"))
    }
}

/// How a talk ended.
struct Said {
    success: bool,
    status: std::process::ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Said {
    fn is_not_found(&self) -> bool {
        String::from_utf8_lossy(&self.stdout).trim() == NOT_FOUND
    }

    /// What went wrong, in one sentence. Helpers put their reason on stdout, and some on stderr.
    fn complaint(&self, program: &OsStr, verb: &str) -> String {
        let said = [&self.stdout, &self.stderr].map(|text| {
            let text = String::from_utf8_lossy(text);
            let line = text.trim().lines().next().unwrap_or_default().to_owned();
            // What looks like an answer may have the secret in it.
            if line.starts_with('{') || line.contains("\"Secret\"") {
                String::new()
            } else {
                bounded(&line, 200)
            }
        });
        let reason = said
            .into_iter()
            .find(|line| !line.is_empty())
            .map_or(String::new(), |line| format!(": {line}"));
        let program = program.to_string_lossy();
        format!("`{program} {verb}` ended with {}{reason}", self.status)
    }
}

/// Ends a helper and what it started, unless it ended by itself.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // An error means that there is nobody left.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs a helper with one word as its argument and `input` on its standard input.
async fn talk(
    program: &OsStr,
    verb: &str,
    input: &[u8],
    patience: Duration,
) -> Result<Said, String> {
    let shown = program.to_string_lossy();
    let mut command = tokio::process::Command::new(program);
    command
        .arg(verb)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("there is no program {shown} in PATH"),
        _ => format!("{shown} cannot be run: {error}"),
    })?;
    let mut group = Group(
        child
            .id()
            .and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)),
    );
    let (mut stdin, stdout, stderr) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let work = async {
        let feed = async {
            if let Some(mut stdin) = stdin.take() {
                // A helper may end without reading.
                let _ = stdin.write_all(input).await;
            }
        };
        let (_, stdout, stderr) = tokio::join!(feed, all(stdout), all(stderr));
        let status = child.wait().await.map_err(|error| error.to_string())?;
        Ok::<_, String>((stdout?, stderr?, status))
    };
    let (stdout, stderr, status) = tokio::time::timeout(patience, work)
        .await
        .map_err(|_| format!("`{shown} {verb}` did not end within {patience:?}"))?
        .map_err(|reason| format!("`{shown} {verb}` {reason}"))?;
    group.0 = None;
    Ok(Said {
        success: status.success(),
        status,
        stdout,
        stderr,
    })
}

async fn all(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(LONGEST_ANSWER + 1)
            .read_to_end(&mut bytes)
            .await
            .map_err(|error| error.to_string())?;
    }
    if bytes.len() as u64 > LONGEST_ANSWER {
        return Err(format!("says more than {LONGEST_ANSWER} bytes"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    /// A helper that runs this shell text; `$1` is the verb.
    fn helper(script: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-test");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    async fn ask(script: &str) -> Answer {
        let (_dir, path) = helper(script);
        // The limit is for helpers that hang; the others share a busy machine.
        get(path.as_os_str(), "h.io:5000", Duration::from_secs(20)).await
    }

    fn login(username: &str, password: &str) -> Answer {
        Ok(Some(Credentials::login(
            username.into(),
            Secret::new(password),
        )))
    }

    #[tokio::test]
    async fn every_answer_of_the_protocol() {
        let print = |text: &str| format!("cat >/dev/null; printf '%s' '{text}'");
        for (script, expected) in [
            (
                print(r#"{"ServerURL":"h.io:5000","Username":"alice","Secret":"s3c:ret"}"#),
                login("alice", "s3c:ret"),
            ),
            (
                print(r#"{"Username":"<token>","Secret":"refresh"}"#),
                Ok(Some(Credentials::Identity(Secret::new("refresh")))),
            ),
            (print(r#"{"Username":"","Secret":""}"#), Ok(None)),
            (
                "echo 'credentials not found in native keychain'; exit 1".to_owned(),
                Ok(None),
            ),
            // The server comes on stdin and nothing but the verb as an argument; what it has is read whether or not it is wanted.
            (
                r#"read server; printf '{"Username":"%s","Secret":"%s"}' "$1/$#" "$server""#
                    .to_owned(),
                login("get/1", "h.io:5000"),
            ),
            (
                r#"printf '{"Username":"a","Secret":"b"}'; exec 0<&-"#.to_owned(),
                login("a", "b"),
            ),
        ] {
            assert_eq!(ask(&script).await, expected, "{script}");
        }
    }

    #[tokio::test]
    async fn helpers_that_fail_are_told_in_a_sentence_without_secrets() {
        for (script, said) in [
            ("echo 'vault is locked'; exit 3", "vault is locked"),
            ("echo 'no bus' >&2; exit 1", "no bus"),
            ("exit 9", "exit status: 9"),
            ("kill -9 $$", "signal: 9"),
            (
                r#"echo '{"Username":"a","Secret":"hunter2"}'; exit 1"#,
                "exit status: 1",
            ),
            ("echo hunter2", "does not answer in JSON"),
            ("true", "does not answer in JSON"),
            (
                r#"echo '{"Username":"","Secret":"hunter2"}'"#,
                "without a user name",
            ),
            (r#"echo '{"Secret":"hunter2"}'"#, "does not answer in JSON"),
            ("yes hunter2", "more than 65536 bytes"),
            ("yes hunter2 >&2", "more than 65536 bytes"),
        ] {
            let error = ask(script).await.expect_err(script);
            assert!(error.contains(said), "{script}: {error}");
            assert!(!error.contains("hunter2"), "{script}: {error}");
        }
        let missing = get(OsStr::new("/nonexistent/helper"), "h", PATIENCE).await;
        assert!(missing.unwrap_err().contains("no program"));
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_ended_with_all_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!(
            "sleep 600 & echo $! >{0}; echo $$ >>{0}; wait",
            pids.display()
        );
        let (_dir, path) = helper(&script);
        let error = get(path.as_os_str(), "h", Duration::from_secs(2)).await;
        assert!(error.unwrap_err().contains("did not end within 2s"));
        let pids = std::fs::read_to_string(pids).unwrap();
        assert_eq!(pids.lines().count(), 2);
        for pid in pids.lines() {
            let stat = format!("/proc/{pid}/stat");
            let gone = || match std::fs::read_to_string(&stat) {
                // Nobody may have waited for it yet.
                Ok(stat) => stat
                    .rsplit(") ")
                    .next()
                    .is_some_and(|rest| rest.starts_with('Z')),
                Err(_) => true,
            };
            for _ in 0..100 {
                if gone() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert!(gone(), "{pid} still runs");
        }
    }

    #[test]
    fn names_that_would_run_something_else_are_refused() {
        assert_eq!(program("ecr-login").unwrap(), "docker-credential-ecr-login");
        for name in [
            "",
            "../x",
            "a/b",
            "a b",
            "a;b",
            "$(x)",
            "a\0",
            "é",
            &"x".repeat(65),
        ] {
            assert!(program(name).is_err(), "{name}");
        }
    }

    #[test]
    fn an_answer_is_for_those_who_waited_and_a_slow_failure_for_a_while() {
        let begun = Instant::now();
        let last = |took, failed| Last {
            begun,
            took: Duration::from_secs(took),
            failed,
            answer: Ok(None),
        };
        let after = |seconds| begun + Duration::from_secs(seconds);
        for (took, failed, asked, answers) in [
            (15, true, 59, true),
            (15, true, 61, false),
            (0, true, 1, false),
            (15, false, 1, false),
            (15, false, 0, true),
        ] {
            assert_eq!(
                last(took, failed).answers(after(asked)),
                answers,
                "{took} {failed} {asked}"
            );
        }
    }

    #[tokio::test]
    async fn a_helper_that_fails_later_takes_no_login_away() {
        // By PATH, as in earnest: the name cannot be known to any other test.
        let helpers = Helpers::default();
        let key = ("ocifs-unit-test-absent".to_owned(), "h.io".to_owned());
        assert!(helpers.get(&key.0, &key.1).await.is_err());
        let entry = lock(&helpers.asked).get(&key).cloned().unwrap();
        entry.lock().await.last_login = login("a", "b").unwrap();
        assert_eq!(helpers.get(&key.0, &key.1).await, login("a", "b"));
        assert!(!format!("{helpers:?}").contains("Basic"));
    }
}
