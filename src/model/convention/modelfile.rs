//! The Modelfile of an Ollama model: what `ollama create -f` makes the same model of (ollama `docs/modelfile.md`, `parser/parser.go`).
//!
//! It is made of the layers that are texts. Where one of them says something that a Modelfile cannot, there is none, rather than one that
//! makes another model.

use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Adds an instruction; `None` where its value cannot be written.
fn instruct(file: &mut String, name: &str, value: &str) -> Option<()> {
    let value = quoted(value)?;
    writeln!(file, "{name} {value}").ok()
}

/// A value as the parser reads it back: as it is, in quotes, or in three of them.
///
/// In quotes it may have line ends. The parser takes quotes at the end of a line for its end, knows no escapes, and drops what Go does not
/// call printable.
fn quoted(value: &str) -> Option<String> {
    let is_read = |c: char| match c {
        '\n' | '\t' | ' ' => true,
        // Separators, marks of direction, and what is for private use.
        '\u{ad}' | '\u{2000}'..='\u{200f}' | '\u{2028}'..='\u{202f}' | '\u{205f}'..='\u{206f}' => {
            false
        }
        '\u{feff}' | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'.. => false,
        _ => !c.is_control() && !c.is_whitespace(),
    };
    if value.is_empty() || !value.chars().all(is_read) {
        return None;
    }
    let is_plain = !value.contains('\n') && !value.starts_with('"') && value.trim() == value;
    match value.contains('"') {
        _ if is_plain => Some(value.to_owned()),
        false => Some(format!("\"{value}\"")),
        true if !value.contains("\"\"\"") => Some(format!("\"\"\"{value}\"\"\"")),
        true => None,
    }
}

/// What a layer says in a Modelfile.
pub(super) enum Part<'a> {
    /// The name of a file beside it.
    From(&'a str),
    Adapter(&'a str),
    Draft(&'a str),
    Template(&'a str),
    System(&'a str),
    /// JSON: an object of numbers, texts, truths, and lists of these.
    Params(&'a str),
    License(&'a str),
    /// JSON: a list of roles and contents.
    Messages(&'a str),
}

/// The Modelfile of these layers and of a config, or what cannot be said in one.
pub(super) fn modelfile(config: &[u8], parts: &[Part<'_>]) -> Result<String, &'static str> {
    let mut file = String::new();
    let mut rest = String::new();
    for part in parts {
        let (told, what) = match part {
            Part::From(name) => (instruct(&mut file, "FROM", &format!("./{name}")), "a name"),
            Part::Adapter(name) => (
                instruct(&mut rest, "ADAPTER", &format!("./{name}")),
                "a name",
            ),
            Part::Draft(name) => (instruct(&mut rest, "DRAFT", &format!("./{name}")), "a name"),
            Part::Template(text) => (instruct(&mut rest, "TEMPLATE", text), "the template"),
            Part::System(text) => (instruct(&mut rest, "SYSTEM", text), "the system message"),
            Part::License(text) => (instruct(&mut rest, "LICENSE", text), "a licence"),
            Part::Params(json) => (params(&mut rest, json), "a parameter"),
            Part::Messages(json) => (messages(&mut rest, json), "a message"),
        };
        told.ok_or(what)?;
    }
    if file.is_empty() {
        return Err("the model");
    }
    file.push_str(&rest);
    // What newer ones have in their config (ollama `types/model/config.go`).
    let config: Map<String, Value> = serde_json::from_slice(config).unwrap_or_default();
    for (key, name) in [
        ("renderer", "RENDERER"),
        ("parser", "PARSER"),
        ("requires", "REQUIRES"),
    ] {
        if let Some(value) = config.get(key).and_then(Value::as_str)
            && !value.is_empty()
        {
            instruct(&mut file, name, value).ok_or("the config")?;
        }
    }
    Ok(file)
}

fn params(file: &mut String, json: &str) -> Option<()> {
    let params: Map<String, Value> = serde_json::from_str(json).ok()?;
    for (name, value) in params {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || !name.chars().all(is_name) {
            return None;
        }
        let values = match value {
            Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let value = match value {
                Value::String(text) => text,
                value @ (Value::Number(_) | Value::Bool(_)) => value.to_string(),
                _ => return None,
            };
            writeln!(file, "PARAMETER {name} {}", quoted(&value)?).ok()?;
        }
    }
    Some(())
}

fn messages(file: &mut String, json: &str) -> Option<()> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Message {
        role: String,
        content: String,
    }
    let messages: Vec<Message> = serde_json::from_str(json).ok()?;
    for Message { role, content } in messages {
        if !["system", "user", "assistant"].contains(&role.as_str()) {
            return None;
        }
        writeln!(file, "MESSAGE {role} {}", quoted(&content)?).ok()?;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_the_parser_reads_them() {
        for (value, written) in [
            ("plain words", Some("plain words")),
            ("{{ .Prompt }}", Some("{{ .Prompt }}")),
            ("say \"hi\"", Some("say \"hi\"")),
            ("\"hi\" he said", Some("\"\"\"\"hi\" he said\"\"\"")),
            ("two\nlines", Some("\"two\nlines\"")),
            ("two\n\"lines\"", Some("\"\"\"two\n\"lines\"\"\"\"")),
            (" space", Some("\" space\"")),
            ("<｜begin▁of▁sentence｜>", Some("<｜begin▁of▁sentence｜>")),
            ("", None),
            ("a\n\"\"\"\nb", None),
            ("nul\0", None),
            ("no-break\u{a0}space", None),
            ("zero\u{200b}width", None),
            ("cr\r\n", None),
        ] {
            assert_eq!(quoted(value).as_deref(), written, "{value:?}");
        }
    }

    /// The values of the instructions in a file, by the rules of ollama's parser.
    fn read(file: &str) -> Vec<String> {
        let (mut values, mut rest) = (Vec::new(), file);
        while let Some((_, behind)) = rest.split_once(' ') {
            let ends = behind.match_indices('\n').map(|(at, _)| at);
            let end = ends
                .filter_map(|at| Some((at, unquoted(behind[..at].trim())?)))
                .next();
            let (at, value) = end.expect("an end");
            values.push(value.to_owned());
            rest = &behind[at + 1..];
        }
        values
    }

    fn unquoted(text: &str) -> Option<&str> {
        for quotes in ["\"\"\"", "\""] {
            if let Some(inside) = text.strip_prefix(quotes) {
                return inside.strip_suffix(quotes);
            }
        }
        Some(text)
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_what_was_said(value in "[a\" \n\té<]{1,12}", more in "[a\" \n]{1,6}") {
            let mut file = String::new();
            let told = [&value, &more].map(|value| instruct(&mut file, "SYSTEM", value));
            let said = [value, more].into_iter().zip(told).filter(|(_, told)| told.is_some());
            let said: Vec<String> = said.map(|(value, _)| value).collect();
            proptest::prop_assert_eq!(read(&file), said);
        }
    }

    #[test]
    fn a_modelfile_says_all_or_is_none() {
        let params =
            r#"{"stop":["<|a|>","<|b c|> "],"temperature":0.7,"num_ctx":4096,"use_mmap":true}"#;
        let messages =
            r#"[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello.\nYes?"}]"#;
        let file = modelfile(
            br#"{"model_format":"gguf","renderer":"qwen","parser":""}"#,
            &[
                Part::Template("{{ .Prompt }}"),
                Part::From("model.gguf"),
                Part::From("mmproj.gguf"),
                Part::Adapter("adapter.gguf"),
                Part::Params(params),
                Part::Messages(messages),
                Part::License("MIT\nas is"),
            ],
        );
        let wanted = "FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE {{ .Prompt }}\nADAPTER ./adapter.gguf\n\
            PARAMETER num_ctx 4096\nPARAMETER stop <|a|>\nPARAMETER stop \"<|b c|> \"\nPARAMETER temperature 0.7\n\
            PARAMETER use_mmap true\nMESSAGE user Hi\nMESSAGE assistant \"Hello.\nYes?\"\nLICENSE \"MIT\nas is\"\nRENDERER qwen\n";
        assert_eq!(file.as_deref(), Ok(wanted));
        for (odd, what) in [
            (Part::Params("{"), "a parameter"),
            (Part::Params(r#"{"a b":1}"#), "a parameter"),
            (Part::Params(r#"{"a":{}}"#), "a parameter"),
            (
                Part::Messages(r#"[{"role":"tool","content":"x"}]"#),
                "a message",
            ),
            (
                Part::Messages(r#"[{"role":"user","content":"x","images":[]}]"#),
                "a message",
            ),
            (Part::System("a\0"), "the system message"),
        ] {
            let parts = [Part::From("model.gguf"), odd];
            assert_eq!(modelfile(b"", &parts).unwrap_err(), what);
        }
        assert_eq!(
            modelfile(b"", &[Part::System("x")]).unwrap_err(),
            "the model"
        );
    }
}
