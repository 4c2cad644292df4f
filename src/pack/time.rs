//! Moments as artifacts write them (RFC 3339, in UTC, to the second).

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// A moment between 1970 and 9999, to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(u64);

/// The first second of the year 10000, which RFC 3339 cannot write.
const END: u64 = 253_402_300_800;

impl Timestamp {
    /// The start of 1970.
    pub const EPOCH: Self = Self(0);

    /// Seconds since 1970; `None` from the year 10000 on.
    pub fn from_unix(seconds: u64) -> Option<Self> {
        (seconds < END).then_some(Self(seconds))
    }

    /// Now.
    pub fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        Self(since.as_secs().min(END - 1))
    }

    /// A point of the system's clock; 1970 for those before it.
    pub fn of(time: SystemTime) -> Self {
        let since = time
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        Self(since.as_secs().min(END - 1))
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, years from March on.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, second) = (self.0 / 86_400, self.0 % 86_400);
        // The year and month are the last whose first day is not behind this one.
        let mut year = 1970 + count / 366;
        while days(year + 1, 1, 1) <= count {
            year += 1;
        }
        let month = (1..=12)
            .rev()
            .find(|month| days(year, *month, 1) <= count)
            .unwrap_or(1);
        let day = count - days(year, month, 1) + 1;
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        )
    }
}

impl FromStr for Timestamp {
    type Err = String;

    /// Reads `now`, `@SECONDS` since 1970, or RFC 3339 in UTC (`2026-01-31T12:00:00Z`, or the date alone).
    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "`{text}` is not a time; write it like 2026-01-31T12:00:00Z, 2026-01-31, @SECONDS or now"
            )
        };
        if text == "now" {
            return Ok(Self::now());
        }
        if let Some(seconds) = text.strip_prefix('@') {
            return seconds
                .parse()
                .ok()
                .and_then(Self::from_unix)
                .ok_or_else(refuse);
        }
        let (date, clock) = text.split_once('T').unwrap_or((text, "00:00:00Z"));
        let date = fields(date, '-', &[4, 2, 2]).ok_or_else(refuse)?;
        let clock = clock
            .strip_suffix('Z')
            .and_then(|clock| fields(clock, ':', &[2, 2, 2]))
            .ok_or_else(refuse)?;
        let ([year, month, day], [hour, minute, second]) = (date, clock);
        if !(1970..=9999).contains(&year)
            || !(1..=12).contains(&month)
            || hour > 23
            || minute > 59
            || second > 59
        {
            return Err(refuse());
        }
        let (next_year, next_month) = if month == 12 {
            (year + 1, 1)
        } else {
            (year, month + 1)
        };
        let length = days(next_year, next_month, 1) - days(year, month, 1);
        if !(1..=length).contains(&day) {
            return Err(refuse());
        }
        Self::from_unix(days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
            .ok_or_else(refuse)
    }
}

/// Three numbers of these widths with a separator between them.
fn fields(text: &str, separator: char, widths: &[usize; 3]) -> Option<[u64; 3]> {
    let mut numbers = [0; 3];
    let mut parts = text.split(separator);
    for (number, width) in numbers.iter_mut().zip(widths) {
        let part = parts
            .next()
            .filter(|part| part.len() == *width && part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_agree_with_date_1() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (END - 1, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(Timestamp(seconds).to_string(), text);
            assert_eq!(text.parse(), Ok(Timestamp(seconds)));
            assert_eq!(format!("@{seconds}").parse(), Ok(Timestamp(seconds)));
        }
        assert_eq!("2024-02-29".parse(), Ok(Timestamp(1_709_164_800)));
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        for text in [
            "",
            "2023-02-29",
            "2024-13-01",
            "2024-1-1",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00",
            "1969-12-31",
            "@-1",
            "@253402300800",
            "2024-01-00",
            "2024-01-01-01",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
