//! What a body of `/v1/completions` or `/v1/chat/completions` asks for. Pure; what cannot be done is refused, never ignored.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::super::sample::Sampling;
use super::super::template::Message;

/// A refusal: its message, and the field that is at fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) message: String,
    pub(super) param: Option<&'static str>,
}

/// A prompt, as it came.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Chat {
        messages: Vec<Message>,
        tools: Option<minijinja::Value>,
    },
}

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ask {
    pub(super) model: Option<String>,
    pub(super) prompt: Prompt,
    pub(super) most: Option<usize>,
    pub(super) sampling: Sampling,
    pub(super) stops: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

/// Fields that change nothing in an answer, or that say what is so anyway.
const HARMLESS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "tools",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "verbosity",
    "reasoning_effort",
];

struct Fields<'a>(&'a Map<String, Value>);

type Result<T> = std::result::Result<T, Refused>;

fn refuse<T>(param: &'static str, message: impl Into<String>) -> Result<T> {
    Err(Refused {
        message: message.into(),
        param: Some(param),
    })
}

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn number(
        &self,
        name: &'static str,
        range: std::ops::RangeInclusive<f64>,
    ) -> Result<Option<f64>> {
        match self.get(name).map(Value::as_f64) {
            None => Ok(None),
            Some(Some(number)) if range.contains(&number) => Ok(Some(number)),
            Some(_) => refuse(
                name,
                format!(
                    "`{name}` is not a number from {} to {}",
                    range.start(),
                    range.end()
                ),
            ),
        }
    }

    fn count(&self, name: &'static str) -> Result<Option<usize>> {
        match self.get(name).map(Value::as_u64) {
            None => Ok(None),
            Some(Some(number)) => Ok(Some(usize::try_from(number).unwrap_or(usize::MAX))),
            Some(None) => refuse(name, format!("`{name}` is not a whole number from 0")),
        }
    }

    fn flag(&self, name: &'static str) -> Result<bool> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => refuse(name, format!("`{name}` is not true or false")),
        }
    }
}

/// Reads a body. `chat`: of the chat endpoint. `defaults`: what counts where nothing is said; `seed` too.
pub(super) fn parse(body: &[u8], chat: bool, defaults: &Sampling, seed: u64) -> Result<Ask> {
    let value: Value = serde_json::from_slice(body).map_err(|error| Refused {
        message: format!("the body is not JSON: {error}"),
        param: None,
    })?;
    let Value::Object(map) = &value else {
        return Err(Refused {
            message: "the body is not a JSON object".to_owned(),
            param: None,
        });
    };
    let fields = Fields(map);
    let model = match fields.get("model") {
        None => None,
        Some(Value::String(model)) => Some(model.clone()),
        Some(_) => return refuse("model", "`model` is not a string"),
    };
    let prompt = if chat {
        conversation(&fields, body)?
    } else {
        prompt(&fields)?
    };
    let most = match fields.count("max_completion_tokens")? {
        Some(most) => Some(most),
        None => fields.count("max_tokens")?,
    };
    if most == Some(0) {
        return refuse("max_tokens", "at least one token has to be asked for");
    }
    let ask = Ask {
        model,
        prompt,
        // The older endpoint has always stopped at 16 if nobody said more.
        most: most.or((!chat).then_some(16)),
        sampling: sampling(&fields, defaults, seed)?,
        stops: stops(&fields)?,
        stream: fields.flag("stream")?,
        include_usage: usage(&fields)?,
    };
    refuse_the_rest(&fields)?;
    Ok(ask)
}

fn sampling(fields: &Fields<'_>, defaults: &Sampling, seed: u64) -> Result<Sampling> {
    let mut bias = Vec::new();
    match fields.get("logit_bias") {
        None => {}
        Some(Value::Object(map)) => {
            for (token, value) in map {
                let (Ok(token), Some(value)) = (token.parse(), value.as_f64()) else {
                    return refuse(
                        "logit_bias",
                        "`logit_bias` is not an object of token ids and numbers",
                    );
                };
                bias.push((token, value as f32));
            }
        }
        Some(_) => {
            return refuse(
                "logit_bias",
                "`logit_bias` is not an object of token ids and numbers",
            );
        }
    }
    let seed = match fields.get("seed") {
        None => seed,
        Some(value) => match value.as_i64() {
            Some(seed) => seed as u64,
            None => return refuse("seed", "`seed` is not a whole number"),
        },
    };
    Ok(Sampling {
        temperature: fields
            .number("temperature", 0.0..=2.0)?
            .unwrap_or(defaults.temperature),
        top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(defaults.top_p),
        top_k: fields.count("top_k")?.unwrap_or(defaults.top_k),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=100.0)?
            .unwrap_or(defaults.repetition_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        presence_penalty: fields
            .number("presence_penalty", -2.0..=2.0)?
            .unwrap_or(0.0),
        bias,
        seed,
    })
}

fn stops(fields: &Fields<'_>) -> Result<Vec<String>> {
    match fields.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(word)) => Ok(vec![word.clone()]),
        Some(Value::Array(words)) if words.len() <= 16 => words
            .iter()
            .map(|word| {
                word.as_str().map(str::to_owned).map_or_else(
                    || refuse("stop", "`stop` has something that is no string"),
                    Ok,
                )
            })
            .collect(),
        Some(_) => refuse("stop", "`stop` is not a string or a list of at most 16"),
    }
}

fn usage(fields: &Fields<'_>) -> Result<bool> {
    match fields.get("stream_options") {
        None => Ok(false),
        Some(Value::Object(options)) => Fields(options).flag("include_usage"),
        Some(_) => refuse("stream_options", "`stream_options` is not an object"),
    }
}

/// What would give another answer than asked for, if it were passed over.
fn refuse_the_rest(fields: &Fields<'_>) -> Result<()> {
    for name in ["n", "best_of"] {
        if fields
            .get(name)
            .is_some_and(|value| value.as_u64() != Some(1))
        {
            return refuse("n", "only one answer can be asked for (`n`, `best_of`)");
        }
    }
    for (name, message) in [
        ("logprobs", "log probabilities are not given"),
        ("top_logprobs", "log probabilities are not given"),
        ("echo", "the prompt is not given back"),
        ("suffix", "a text between two others is not made"),
        (
            "functions",
            "`functions` are not supported; `tools` are given to the chat template",
        ),
        ("audio", "there is no audio"),
    ] {
        if fields
            .get(name)
            .is_some_and(|value| !matches!(value, Value::Bool(false)) && value.as_u64() != Some(0))
        {
            return refuse(name, message);
        }
    }
    if fields
        .get("response_format")
        .is_some_and(|format| format["type"] != "text")
    {
        return refuse(
            "response_format",
            "only the response format `text` is supported",
        );
    }
    if fields
        .get("tool_choice")
        .is_some_and(|choice| choice != "auto" && choice != "none")
    {
        return refuse("tool_choice", "a call of a tool cannot be forced");
    }
    if fields
        .get("modalities")
        .is_some_and(|all| *all != serde_json::json!(["text"]))
    {
        return refuse("modalities", "there is only text");
    }
    const KNOWN: &[&str] = &[
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
        "best_of",
        "logprobs",
        "top_logprobs",
        "echo",
        "suffix",
        "functions",
        "audio",
        "response_format",
        "tool_choice",
        "modalities",
    ];
    match fields
        .0
        .keys()
        .find(|name| !KNOWN.contains(&name.as_str()) && !HARMLESS.contains(&name.as_str()))
    {
        None => Ok(()),
        Some(name) => Err(Refused {
            message: format!("`{name}` is not a parameter that is known here"),
            param: None,
        }),
    }
}

fn prompt(fields: &Fields<'_>) -> Result<Prompt> {
    let wrong = || {
        refuse(
            "prompt",
            "`prompt` is not a string or a list of tokens; one prompt a request",
        )
    };
    match fields.get("prompt") {
        None => refuse("prompt", "`prompt` is missing"),
        Some(Value::String(text)) => Ok(Prompt::Text(text.clone())),
        Some(Value::Array(list)) => match list.as_slice() {
            [Value::String(text)] => Ok(Prompt::Text(text.clone())),
            [Value::Array(tokens)] => ids(tokens).map_or_else(wrong, |ids| Ok(Prompt::Tokens(ids))),
            tokens => ids(tokens).map_or_else(wrong, |ids| Ok(Prompt::Tokens(ids))),
        },
        Some(_) => wrong(),
    }
}

fn ids(tokens: &[Value]) -> Option<Vec<u32>> {
    tokens
        .iter()
        .map(|token| token.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect()
}

fn conversation(fields: &Fields<'_>, body: &[u8]) -> Result<Prompt> {
    let Some(list) = fields.get("messages") else {
        return refuse("messages", "`messages` is missing");
    };
    let Some(list) = list.as_array().filter(|list| !list.is_empty()) else {
        return refuse("messages", "`messages` is not a list with something in it");
    };
    let messages = list.iter().map(message).collect::<Result<Vec<Message>>>()?;
    let mut tools = None;
    if fields
        .get("tools")
        .is_some_and(|tools| tools.as_array().is_none_or(|tools| !tools.is_empty()))
    {
        // Read again by another parser: the order of a tool's fields is part of the prompt.
        let whole: Option<Ordered> = serde_json::from_slice(body).ok();
        tools = whole.and_then(|whole| whole.0.get_attr("tools").ok());
    }
    Ok(Prompt::Chat { messages, tools })
}

/// JSON whose objects keep the order of their fields.
struct Ordered(minijinja::Value);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(OrderedVisitor)
    }
}

struct OrderedVisitor;

impl<'de> Visitor<'de> for OrderedVisitor {
    type Value = Ordered;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> std::result::Result<Ordered, E> {
        Ok(Ordered(().into()))
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Ordered, E> {
        Ok(Ordered(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Ordered, E> {
        Ok(Ordered(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Ordered, E> {
        Ok(Ordered(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Ordered, E> {
        Ok(Ordered(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Ordered, E> {
        Ok(Ordered(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Ordered, A::Error> {
        let mut all = Vec::new();
        while let Some(Ordered(value)) = seq.next_element()? {
            all.push(value);
        }
        Ok(Ordered(all.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Ordered, A::Error> {
        let mut all = Vec::new();
        while let Some((name, Ordered(value))) = map.next_entry::<String, Ordered>()? {
            all.push((name, value));
        }
        Ok(Ordered(all.into_iter().collect()))
    }
}

/// A message with its content as one string, as templates want it.
fn message(value: &Value) -> Result<Message> {
    let Value::Object(fields) = value else {
        return refuse("messages", "a message is not an object");
    };
    if !fields.get("role").is_some_and(Value::is_string) {
        return refuse("messages", "a message has no `role`");
    }
    let mut message = fields.clone();
    match fields.get("content") {
        Some(Value::String(_) | Value::Null) | None => {}
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for part in parts {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(piece)) => text.push_str(piece),
                    (kind, _) => {
                        return refuse(
                            "messages",
                            format!(
                                "content of type `{}` is not understood; only text is",
                                kind.unwrap_or("?")
                            ),
                        );
                    }
                }
            }
            message.insert("content".to_owned(), Value::String(text));
        }
        Some(_) => return refuse("messages", "the `content` of a message is not text"),
    }
    Ok(Value::Object(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value, chat: bool) -> Result<Ask> {
        parse(
            body.to_string().as_bytes(),
            chat,
            &Sampling {
                top_k: 7,
                ..Sampling::default()
            },
            99,
        )
    }

    #[test]
    fn what_is_not_said_is_as_the_model_has_it() {
        let ask = read(
            &json!({"messages": [{"role": "user", "content": "hi"}]}),
            true,
        )
        .unwrap();
        assert_eq!(
            (ask.sampling.top_k, ask.sampling.seed, ask.most, ask.stream),
            (7, 99, None, false)
        );
        let ask = read(&json!({"prompt": "hi", "temperature": 0.5, "seed": -1, "stop": "x", "stream": true, "stream_options": {"include_usage": true}}), false).unwrap();
        assert_eq!(
            (ask.sampling.temperature, ask.sampling.seed, ask.most),
            (0.5, u64::MAX, Some(16))
        );
        assert_eq!(
            (ask.stops, ask.stream, ask.include_usage),
            (vec!["x".to_owned()], true, true)
        );
    }

    #[test]
    fn content_in_parts_is_joined() {
        let ask = read(
            &json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
            true,
        );
        let Prompt::Chat { messages, .. } = ask.unwrap().prompt else {
            panic!()
        };
        assert_eq!(messages[0]["content"], "ab");
    }

    #[test]
    fn prompts_of_tokens_are_taken() {
        for prompt in [json!([1, 2]), json!([[1, 2]])] {
            assert_eq!(
                read(&json!({"prompt": prompt}), false).unwrap().prompt,
                Prompt::Tokens(vec![1, 2])
            );
        }
        assert_eq!(
            read(&json!({"prompt": ["a"]}), false).unwrap().prompt,
            Prompt::Text("a".to_owned())
        );
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let chat = |name: &str, value: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
            body[name] = value;
            read(&body, true)
        };
        for (name, value) in [
            ("n", json!(2)),
            ("logprobs", json!(true)),
            ("temperature", json!(3)),
            ("temperature", json!("hot")),
            ("top_p", json!(-1)),
            ("max_tokens", json!(0)),
            ("max_tokens", json!(-5)),
            ("max_tokens", json!(1.5)),
            ("stop", json!([1])),
            ("stream", json!("yes")),
            ("seed", json!(1.5)),
            ("response_format", json!({"type": "json_object"})),
            ("tool_choice", json!("required")),
            ("messages", json!([])),
            ("messages", json!("hi")),
            ("messages", json!([{"content": "x"}])),
            (
                "messages",
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            ),
            ("logit_bias", json!({"a": 1})),
            ("typo", json!(1)),
        ] {
            assert!(chat(name, value.clone()).is_err(), "{name}: {value}");
        }
        for (name, value) in [
            ("n", json!(1)),
            ("logprobs", json!(false)),
            ("user", json!("me")),
            ("temperature", Value::Null),
            ("stop", json!([])),
        ] {
            assert!(chat(name, value.clone()).is_ok(), "{name}: {value}");
        }
        for body in ["", "[1]", "{", "nonsense"] {
            assert!(parse(body.as_bytes(), true, &Sampling::default(), 0).is_err());
        }
        assert!(read(&json!({}), false).is_err());
        assert!(read(&json!({"prompt": ["a", "b"]}), false).is_err());
    }
}
