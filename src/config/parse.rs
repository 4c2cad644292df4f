//! Text to values, with messages that tell how to write them.

use std::net::SocketAddr;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::LogFormat;
use crate::base::ByteSize;
use crate::blob::Prefetch;
use crate::registry::{HttpVersion, RegistryConfig};

/// A list in a variable or a mount option. A `:` before a port (digits alone) belongs to the item.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut items: Vec<String> = Vec::new();
    for part in text.split(':') {
        let port =
            !part.is_empty() && part.len() <= 5 && part.bytes().all(|byte| byte.is_ascii_digit());
        match items.last_mut() {
            Some(host) if port && !host.is_empty() && !host.contains(['/', ':']) => {
                host.push(':');
                host.push_str(part);
            }
            _ => items.push(part.trim().to_owned()),
        }
    }
    items.retain(|item| !item.is_empty());
    items
}

pub(super) fn cache_size(text: &str) -> Result<u64, String> {
    at_least(64 << 20, "for a cache", text)
}

/// One part of a blob and the buffers to bring it in.
pub(super) fn memory(text: &str) -> Result<u64, String> {
    at_least(16 << 20, "to work with", text)
}

fn at_least(least: u64, what: &str, text: &str) -> Result<u64, String> {
    let ByteSize(bytes) = text.parse()?;
    if bytes < least {
        return Err(format!(
            "`{text}` is too small {what}; give at least {}",
            ByteSize(least)
        ));
    }
    Ok(bytes)
}

/// The number of a user or group. mount(8) makes numbers of names in `uid=` and `gid=` before it passes them on.
pub(super) fn id(text: &str) -> Result<u32, String> {
    // The highest one says "no such user" to the kernel.
    match text.parse() {
        Ok(number) if number != u32::MAX => Ok(number),
        _ => Err(format!(
            "`{text}` is not the number of a user or group; `id NAME` tells it"
        )),
    }
}

pub(super) fn umask(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match u16::from_str_radix(text, 8) {
        Ok(bits) if digits && bits <= 0o777 => Ok(bits),
        _ => Err(format!(
            "`{text}` is not a mask; write it in octal, like 022 or 027"
        )),
    }
}

pub(super) fn yes_or_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err(format!("`{text}` is neither true nor false")),
    }
}

pub(super) fn http_version(text: &str) -> Result<HttpVersion, String> {
    match text {
        "auto" => Ok(HttpVersion::Auto),
        "1.1" => Ok(HttpVersion::Http1),
        "2" => Ok(HttpVersion::Http2),
        _ => Err(format!("`{text}` is not one of auto, 1.1, 2")),
    }
}

pub(super) fn connections(text: &str) -> Result<usize, String> {
    let most = RegistryConfig::MOST_CONNECTIONS;
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is not a number from 1 to {most}")),
    }
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not an address and a port, like 127.0.0.1:9464"))
}

pub(super) fn log_filter(text: &str) -> Result<String, String> {
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!(
            "`{text}` is no filter of log messages ({error}); write error, warn, info, debug or trace"
        )),
    }
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "auto" => Ok(LogFormat::Auto),
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        "journal" => Ok(LogFormat::Journal),
        _ => Err(format!("`{text}` is not one of auto, text, json, journal")),
    }
}

pub(super) fn strict(text: &str) -> Result<bool, String> {
    match text {
        "early" => Ok(false),
        "strict" => Ok(true),
        _ => Err(format!("`{text}` is not one of early, strict")),
    }
}

pub(super) fn prefetch(text: &str) -> Result<Prefetch, String> {
    match text {
        "none" => Ok(Prefetch::None),
        "blob" => Ok(Prefetch::Blob),
        "model" => Ok(Prefetch::Model),
        _ => Err(format!("`{text}` is not one of none, blob, model")),
    }
}

/// A duration as people write it: `90s`, `15m`, `1h30m`, `500ms`, `2d`, `0`.
///
/// # Errors
/// When a number has no unit, the unit is unknown, or the sum is more than a year.
pub fn duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is not a duration; write it like 90s, 15m or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut rest, mut millis) = (text, 0u64);
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(refuse)?;
        let (number, behind) = rest.split_at(digits);
        let end = behind
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(behind.len());
        let unit = match &behind[..end] {
            "ms" => 1,
            "s" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(refuse()),
        };
        let number: u64 = number.parse().map_err(|_| refuse())?;
        millis = number
            .checked_mul(unit)
            .and_then(|part| millis.checked_add(part))
            .ok_or_else(refuse)?;
        rest = &behind[end..];
    }
    match millis {
        _ if text.is_empty() => Err(refuse()),
        0..=31_622_400_000 => Ok(Duration::from_millis(millis)),
        _ => Err(format!("`{text}` is longer than a year")),
    }
}

pub(super) fn positive(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be longer than 0".to_owned()),
        span => Ok(span),
    }
}
