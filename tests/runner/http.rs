//! The HTTP endpoint, with OpenAI's own client and with what no client sends.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::smollm::smollm;
use crate::support::process::{Daemon, run_command};
use crate::support::python::environment;
use crate::support::{eventually, heavy, scratch};

/// Unoptimised inner loops on a loaded machine.
const LONG: Duration = Duration::from_secs(900);

struct Server {
    daemon: Daemon,
    address: String,
    _dir: TempDir,
}

impl Server {
    fn start(queue: &str) -> Self {
        let dir = scratch("listen");
        let log = dir.path().join("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_ocifs-run"));
        command.arg(smollm()).args([
            "--listen",
            "127.0.0.1:0",
            "--name",
            "org/smollm2:v1",
            "--ctx",
            "1024",
            "--device",
            "cpu",
            "--queue",
            queue,
        ]);
        let daemon = Daemon::start("ocifs-run", &mut command, &log);
        let address = eventually(LONG, "the server is up", || {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            let (_, rest) = said.split_once("on http://")?;
            Some(rest.split_once("/v1")?.0.to_owned())
        });
        Self {
            daemon,
            address,
            _dir: dir,
        }
    }

    /// What `tests/py/openai_client.py` finds.
    fn client(&self, scenario: &str) -> Value {
        let python = environment().join("runner/bin/python3");
        assert!(
            python.exists(),
            "{} is missing; tests/setup.sh makes it",
            python.display()
        );
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/py/openai_client.py");
        let mut command = Command::new(python);
        command
            .arg("-B")
            .arg(script)
            .arg(format!("http://{}", self.address))
            .arg(scenario);
        for name in [
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ] {
            command.env_remove(name);
        }
        serde_json::from_str(&run_command(&mut command, LONG).ok()).unwrap()
    }

    /// A request as it is on the wire, and the whole response.
    fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }

    fn get(&self, path: &str) -> String {
        self.raw(&format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ))
    }

    fn post(&self, path: &str, body: &str) -> String {
        self.raw(&format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("ocifs_run_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .trim()
            .parse()
            .unwrap()
    }
}

#[test]
fn the_client_works_as_with_its_own_service() {
    let _alone = heavy();
    let server = Server::start("64");
    let plain = server.client("plain");
    assert_eq!(
        (plain["model"].as_str(), plain["retrieved"].as_str()),
        (Some("org/smollm2:v1"), Some("org/smollm2:v1"))
    );
    assert_eq!(
        plain["one"]["choices"][0]["text"], " Paris.\n\nThe answer",
        "{plain}"
    );
    assert_eq!(plain["one"]["choices"][0]["finish_reason"], "length");
    assert_eq!(plain["one"]["usage"]["prompt_tokens"], 5);
    assert_eq!(plain["one"]["usage"]["completion_tokens"], 6);
    // The second time all of the prompt but its last token is known.
    assert_eq!(
        plain["again"]["usage"]["prompt_tokens_details"]["cached_tokens"],
        4
    );
    assert_eq!(plain["again"]["choices"], plain["one"]["choices"]);
    assert_eq!(plain["chat"]["choices"][0]["message"]["role"], "assistant");
    assert!(
        plain["chat"]["usage"]["prompt_tokens"].as_u64().unwrap() > 10,
        "{plain}"
    );
    let seeds = plain["seeds"].as_array().unwrap();
    assert!(seeds[0] == seeds[1] && seeds[0] != seeds[2], "{seeds:?}");

    let stream = server.client("stream");
    assert_eq!(stream["text"], plain["one"]["choices"][0]["text"]);
    assert_eq!(
        stream["finish"].as_array().unwrap().last().unwrap(),
        "length"
    );
    assert_eq!(stream["usage"][0]["completion_tokens"], 6);
    assert_eq!(stream["chat"], stream["whole"]);
    assert_eq!(
        (
            stream["role"].as_str(),
            stream["ids"].as_u64(),
            stream["chat_usage"].as_array().map(Vec::len)
        ),
        (Some("assistant"), Some(1), Some(0))
    );

    let stop = server.client("stop");
    assert_eq!(
        (stop["text"].as_str(), stop["finish"].as_str()),
        (Some(" Paris."), Some("stop"))
    );
    assert_eq!(
        (stop["streamed"].as_str(), stop["streamed_finish"].as_str()),
        (Some(" Paris"), Some("stop"))
    );

    let errors = server.client("errors");
    for (name, status) in [
        ("model", 404),
        ("n", 400),
        ("temperature", 400),
        ("long", 400),
        ("empty", 400),
        ("image", 400),
        ("typo", 400),
    ] {
        assert_eq!(errors[name]["status"], status, "{name}: {errors}");
        assert!(
            errors[name]["body"]["message"]
                .as_str()
                .is_some_and(|message| message.len() > 10),
            "{name}: {errors}"
        );
    }
    assert_eq!(errors["long"]["body"]["code"], "context_length_exceeded");
    assert_eq!(server.metric("requests_refused_total"), 7.0);

    // A reader that leaves ends the work: what 400 tokens would take is not spent.
    let before = server.metric("generated_tokens_total");
    let abort = server.client("abort");
    assert_eq!(abort["after"], " Paris.");
    eventually(LONG, "the request is given up", || {
        (server.metric("requests_dropped_total") == 1.0).then_some(())
    });
    assert!(server.metric("generated_tokens_total") - before < 350.0);
    assert_eq!(server.metric("requests_failed_total"), 0.0);
}

#[test]
fn too_many_requests_are_refused_and_the_others_answered() {
    let _alone = heavy();
    let server = Server::start("2");
    let overload = server.client("overload");
    let results = overload["results"].as_array().unwrap();
    let (answers, refusals): (Vec<&Value>, Vec<&Value>) =
        results.iter().partition(|result| result.is_string());
    assert_eq!(results.len(), 8);
    assert!(answers.len() >= 3 && !refusals.is_empty(), "{overload}");
    assert!(
        answers.iter().all(|answer| **answer == overload["after"]),
        "{overload}"
    );
    assert!(
        refusals
            .iter()
            .all(|refusal| refusal["status"] == 503 && refusal["body"]["code"] == "overloaded"),
        "{overload}"
    );
    assert_eq!(
        server.metric("requests_overloaded_total"),
        refusals.len() as f64
    );
}

#[test]
fn what_is_no_request_gets_a_clear_answer() {
    let _alone = heavy();
    let mut server = Server::start("8");
    assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    for (response, status) in [
        (server.post("/v1/completions", "{\"prompt\": "), 400),
        (server.post("/v1/completions", "[]"), 400),
        (
            server.post("/v1/completions", "{\"prompt\": [99999999]}"),
            400,
        ),
        (server.post("/v1/chat/completions", "\u{0}"), 400),
        (server.get("/v1/completions"), 405),
        (server.post("/health", ""), 405),
        (server.get("/v2/"), 404),
        (server.get("/v1/models/other"), 404),
    ] {
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status}")),
            "{response}"
        );
        let (_, body) = response.split_once("\r\n\r\n").unwrap();
        let error: Value = serde_json::from_str(body).unwrap();
        assert!(
            error["error"]["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty()),
            "{response}"
        );
    }
    // A client that says it will send much is not waited for.
    let response = server.raw("POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 99999999999\r\n\r\n{");
    assert!(response.starts_with("HTTP/1.1 413"), "{response}");
    // A body that breaks off harms nobody.
    drop(
        TcpStream::connect(&server.address)
            .unwrap()
            .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"),
    );
    assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    server.daemon.signal(rustix::process::Signal::TERM);
    let status = server
        .daemon
        .wait(LONG)
        .expect("the server ends when it is told to");
    assert!(status.success(), "{status}");
}
