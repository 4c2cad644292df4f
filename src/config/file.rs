//! The configuration file: TOML, one key per setting.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{ConfigError, Origin, SETTINGS, Setting, Values, nearest};

/// The largest file that is read.
const LARGEST: u64 = 1 << 20;

/// Adds what a file says to `values`.
pub(super) fn read(path: &Path, values: &mut Values) -> Result<(), ConfigError> {
    let fail = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    File::open(path)
        .map_err(fail)?
        .take(LARGEST)
        .read_to_string(&mut text)
        .map_err(fail)?;
    parse(&text, path, values)
}

pub(super) fn parse(text: &str, path: &Path, values: &mut Values) -> Result<(), ConfigError> {
    let line = |offset: usize| {
        1 + text
            .bytes()
            .take(offset)
            .filter(|byte| *byte == b'\n')
            .count()
    };
    let table = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        line: line(error.span().map_or(0, |span| span.start)),
        reason: error.message().to_owned(),
    })?;
    for (key, value) in table.get_ref() {
        let origin = Origin::File(path.to_owned(), line(key.span().start));
        let refuse = |reason: String| ConfigError::Value {
            origin: origin.clone(),
            reason,
        };
        let name = key.get_ref().replace('_', "-");
        let Some(setting) = Setting::named(&name) else {
            let near = nearest(&name, SETTINGS.iter().map(|setting| setting.name));
            let hint = near
                .map(|near| format!("; did you mean `{near}`?"))
                .unwrap_or_default();
            return Err(refuse(format!(
                "there is no setting `{}`{hint}",
                key.get_ref()
            )));
        };
        let list = match value.get_ref() {
            DeValue::Array(items) if setting.many => {
                let texts: Option<Vec<String>> = items.iter().map(scalar).collect();
                texts.ok_or_else(|| {
                    refuse(format!("`{name}` is a list of texts: {name} = [\"…\"]"))
                })?
            }
            _ => vec![scalar(value).ok_or_else(|| refuse(format!("`{name}` takes one value")))?],
        };
        values.give(setting, list, origin);
    }
    Ok(())
}

fn scalar(value: &Spanned<DeValue<'_>>) -> Option<String> {
    match value.get_ref() {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        _ => None,
    }
}
