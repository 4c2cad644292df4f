//! When an artifact was created: RFC 3339 timestamps in configs and annotations.

use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::manifest::Manifest;

/// The predefined annotation of the image-spec (annotations.md).
const ANNOTATION: &str = "org.opencontainers.image.created";

/// The creation time that the config or the manifest tells, else the epoch.
///
/// Docker's model config has `descriptor.created`, ModelPack's `descriptor.createdAt`, an image config `created`.
pub(super) fn created(manifest: &Manifest, config: &[u8]) -> SystemTime {
    #[derive(Deserialize, Default)]
    struct Config {
        descriptor: Option<Descriptor>,
        created: Option<String>,
    }
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase")]
    struct Descriptor {
        created: Option<String>,
        created_at: Option<String>,
    }
    let config: Config = serde_json::from_slice(config).unwrap_or_default();
    let descriptor = config.descriptor.unwrap_or_default();
    let annotation = manifest.annotations.get(ANNOTATION).cloned();
    [
        descriptor.created,
        descriptor.created_at,
        annotation,
        config.created,
    ]
    .iter()
    .flatten()
    .find_map(|text| parse(text))
    .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Parses an RFC 3339 `date-time`. `None` for anything else and for moments before 1970 (Go writes the year 1 for
/// "not known").
pub(super) fn parse(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    let number = |start: usize, len: usize| -> Option<u64> {
        let digits = bytes.get(start..start + len)?;
        digits.iter().try_fold(0, |sum, digit| {
            digit
                .is_ascii_digit()
                .then(|| sum * 10 + u64::from(digit - b'0'))
        })
    };
    let is = |at: usize, allowed: &[u8]| bytes.get(at).is_some_and(|byte| allowed.contains(byte));
    if !(is(4, b"-") && is(7, b"-") && is(10, b"Tt ") && is(13, b":") && is(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 2)?, number(8, 2)?);
    let (hour, minute, second) = (number(11, 2)?, number(14, 2)?, number(17, 2)?);
    if year < 1970 || !(1..=12).contains(&month) || day == 0 || day > days_in(year, month) {
        return None;
    }
    // A leap second (60) is taken as the second after it.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut at = 19;
    let mut nanos = 0;
    if is(at, b".") {
        let digits = bytes[at + 1..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        if digits == 0 {
            return None;
        }
        for place in 0..9 {
            nanos = nanos * 10
                + if place < digits {
                    u32::from(bytes[at + 1 + place] - b'0')
                } else {
                    0
                };
        }
        at += 1 + digits;
    }
    let (sign, offset) = match &bytes[at..] {
        [b'Z' | b'z'] => (1, 0),
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let (hours, minutes) = (number(at + 1, 2)?, number(at + 4, 2)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            (
                if *sign == b'+' { 1 } else { -1 },
                hours * 3600 + minutes * 60,
            )
        }
        _ => return None,
    };
    let local = days_before(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    let seconds = local.checked_add_signed(-sign * i64::try_from(offset).ok()?)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to this date; `year` is 1970 or later.
fn days_before(year: u64, month: u64, day: u64) -> u64 {
    let years: u64 = (1970..year)
        .map(|year| if is_leap(year) { 366 } else { 365 })
        .sum();
    let months: u64 = (1..month).map(|month| days_in(year, month)).sum();
    years + months + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(text: &str) -> Option<f64> {
        parse(text).map(|time| {
            time.duration_since(SystemTime::UNIX_EPOCH)
                .unwrap()
                .as_secs_f64()
        })
    }

    #[test]
    fn rfc_3339_is_read() {
        // The first two examples are those of RFC 3339, section 5.8, moved past 1970.
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", 0.0),
            ("1985-04-12T23:20:50.52Z", 482_196_050.52),
            ("1996-12-19T16:39:57-08:00", 851_042_397.0),
            ("1990-12-31T23:59:60Z", 662_688_000.0),
            ("2000-02-29T12:00:00+00:00", 951_825_600.0),
            ("2025-10-03T01:00:00+02:00", 1_759_446_000.0),
            ("2025-10-03T01:00:00.123456789012Z", 1_759_453_200.123_456_7),
        ] {
            let got = seconds(text).unwrap_or_else(|| panic!("{text}"));
            assert!(
                (got - expected).abs() < 1e-3,
                "{text}: {got} is not {expected}"
            );
        }
    }

    #[test]
    fn what_is_no_timestamp_or_lies_before_1970_is_none() {
        for text in [
            "",
            "2025",
            "2025-13-01T00:00:00Z",
            "2025-02-29T00:00:00Z",
            "2025-01-00T00:00:00Z",
            "2025-01-01T24:00:00Z",
            "2025-01-01T00:00:00",
            "2025-01-01T00:00:00.Z",
            "2025-01-01T00:00:00+1:00",
            "0001-01-01T00:00:00Z",
            "1970-01-01T00:30:00+01:00",
            "2025-01-01T00:00:00Zjunk",
            "२०२५-01-01T00:00:00Z",
        ] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    #[test]
    fn each_place_is_looked_at_in_turn() {
        let mut manifest = Manifest::for_tests(&[]);
        let epoch = SystemTime::UNIX_EPOCH;
        let at = |seconds| epoch + Duration::from_secs(seconds);
        assert_eq!(created(&manifest, b"not json"), epoch);
        assert_eq!(
            created(&manifest, br#"{"created":"1970-01-01T00:00:03Z"}"#),
            at(3)
        );
        manifest
            .annotations
            .insert(ANNOTATION.into(), "1970-01-01T00:00:02Z".into());
        assert_eq!(
            created(&manifest, br#"{"created":"1970-01-01T00:00:03Z"}"#),
            at(2)
        );
        assert_eq!(
            created(
                &manifest,
                br#"{"descriptor":{"created":"1970-01-01T00:00:01Z"}}"#
            ),
            at(1)
        );
        assert_eq!(
            created(
                &manifest,
                br#"{"descriptor":{"createdAt":"1970-01-01T00:00:01Z"}}"#
            ),
            at(1)
        );
        assert_eq!(
            created(
                &manifest,
                br#"{"descriptor":{"created":"0001-01-01T00:00:00Z"}}"#
            ),
            at(2)
        );
        assert_eq!(created(&manifest, br#"{"descriptor":7}"#), at(2));
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,40}|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[.Z+0-9:-]{0,12}") {
            let _ = parse(&text);
        }
    }
}
