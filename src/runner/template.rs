//! Chat templates: Jinja as transformers renders it, with the functions that templates of published models call.

use std::path::Path;

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::Formatter;

use super::error::{Error, Result};

/// A model's chat template and the special tokens that it names.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    specials: Vec<(String, String)>,
}

/// One message of a chat: `role`, `content`, and whatever else the template reads.
pub type Message = serde_json::Value;

const NAME: &str = "chat_template";

impl Template {
    /// Reads it from a model directory; `None` when the model has none.
    ///
    /// # Errors
    /// When a file cannot be read, or the template not be parsed.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("tokenizer_config.json");
        let config: serde_json::Value = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Error::malformed(&path, error.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => serde_json::Value::Null,
            Err(error) => return Err(Error::io(&path, error)),
        };
        // transformers: the file of its own comes first, else the one called `default` of several.
        let own = dir.join("chat_template.jinja");
        let (path, source) = match std::fs::read_to_string(&own) {
            Ok(source) => (own, Some(source)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                (path, in_config(&config))
            }
            Err(error) => return Err(Error::io(&own, error)),
        };
        source
            .map(|source| {
                Self::new(source, specials(&config)).map_err(|error| {
                    Error::malformed(&path, format!("its chat template: {error:#}"))
                })
            })
            .transpose()
    }

    fn new(
        source: String,
        specials: Vec<(String, String)>,
    ) -> std::result::Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source)?;
        Ok(Self {
            environment,
            specials,
        })
    }

    /// The prompt for a chat that the model is to go on with.
    ///
    /// # Errors
    /// What the template says against these messages.
    pub fn render(&self, messages: &[Message], tools: Option<&Value>) -> Result<String> {
        let specials: Value = self
            .specials
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())))
            .collect();
        let values = context! {
            messages => messages,
            tools => tools,
            documents => (),
            add_generation_prompt => true,
            ..specials
        };
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(values))
            .map_err(|error| {
                Error::Request(format!(
                    "the model's chat template: {}",
                    error.detail().unwrap_or(&error.to_string())
                ))
            })
    }
}

fn in_config(config: &serde_json::Value) -> Option<String> {
    match config.get("chat_template")? {
        serde_json::Value::String(source) => Some(source.clone()),
        serde_json::Value::Array(several) => several
            .iter()
            .find(|one| one["name"] == "default")
            .and_then(|one| one["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// `bos_token`, `eos_token` and the like, which are written as strings or as objects with `content`.
fn specials(config: &serde_json::Value) -> Vec<(String, String)> {
    [
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ]
    .into_iter()
    .filter_map(|name| {
        let value = config.get(name)?;
        let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((name.to_owned(), token.to_owned()))
    })
    .collect()
}

/// The token that ends a text, as `tokenizer_config.json` names it.
pub(super) fn end_token(dir: &Path) -> Option<String> {
    let text = std::fs::read(dir.join("tokenizer_config.json")).ok()?;
    let config = serde_json::from_slice(&text).ok()?;
    specials(&config)
        .into_iter()
        .find(|(name, _)| name == "eos_token")
        .map(|(_, token)| token)
}

/// The local time, in C's format.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let wrong =
        || minijinja::Error::new(ErrorKind::InvalidOperation, "a date that cannot be written");
    let format = std::ffi::CString::new(format).map_err(|_| wrong())?;
    let mut buffer = vec![0u8; 256];
    // SAFETY: all pointers are to live values of the right types, and strftime is told the buffer's length.
    let length = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut parts).is_null() {
            return Err(wrong());
        }
        libc::strftime(
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            format.as_ptr(),
            &parts,
        )
    };
    buffer.truncate(length);
    String::from_utf8(buffer).map_err(|_| wrong())
}

/// As Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it: models were trained on that spacing.
fn to_json(
    value: Value,
    arguments: minijinja::value::Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let _: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(
                &mut out, formatter,
            ))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out, Spaced,
        )),
    };
    written
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
}

/// A space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first {
            Ok(())
        } else {
            writer.write_all(b", ")
        }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        let specials = vec![("bos_token".to_owned(), "<s>".to_owned())];
        Template::new(source.to_owned(), specials)
            .unwrap()
            .render(messages, None)
    }

    #[test]
    fn a_template_as_models_have_them() {
        let source = "{{ bos_token }}{% for message in messages %}\n    {% if message['role'] not in ['user', 'assistant'] %}\n        \
            {{- raise_exception('no ' + message.role) }}\n    {% endif %}\n    {{- '<|' + message['role'] + '|>' + message['content'].strip() + '\n' }}\n{% endfor %}\n\
            {% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% if tools %}{{ tools | tojson }}{% endif %}";
        let text = render(source, &[json!({"role": "user", "content": " hi "})]).unwrap();
        assert_eq!(text, "<s><|user|>hi\n\n<|assistant|>");
        let error = render(source, &[json!({"role": "system", "content": "x"})]).unwrap_err();
        assert!(error.to_string().contains("no system"), "{error}");
    }

    #[test]
    fn json_is_spaced_as_python_writes_it() {
        let text = render(
            "{{ messages[0] | tojson }}",
            &[json!({"a": [1, "é<"], "b": {}})],
        )
        .unwrap();
        assert_eq!(text, r#"{"a": [1, "é<"], "b": {}}"#);
        let text = render("{{ messages[0] | tojson(indent=2) }}", &[json!({"a": [1]})]).unwrap();
        assert_eq!(text, "{\n  \"a\": [\n    1\n  ]\n}");
    }

    #[test]
    fn dates_and_loops_work() {
        let year = render("{{ strftime_now('%Y') }}", &[]).unwrap();
        assert!(year.len() == 4 && year.starts_with('2'), "{year}");
        let text = render(
            "{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}",
            &[],
        )
        .unwrap();
        assert_eq!(text, "01");
    }
}
