//! Which bytes a GET asks for (RFC 9110, section 14), as a pure function.

use crate::base::ByteRange;

/// What a `Range` header means for a representation of a known size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it: no header, one that is not understood, or one that a server may ignore.
    Whole,
    /// These bytes: answer 206.
    Part(ByteRange),
    /// No byte of it: answer 416.
    Nothing,
}

/// Reads a `Range` header for a representation of `size` bytes.
///
/// A single range is honoured. Several ranges, other units and malformed values are ignored, as RFC 9110
/// section 14.2 allows: the client then gets all of it and has to cope anyway.
pub(super) fn wanted(header: Option<&str>, size: u64) -> Wanted {
    let Some(spec) = header.and_then(bytes_unit) else {
        return Wanted::Whole;
    };
    let Some((first, last)) = spec.split_once('-') else {
        return Wanted::Whole;
    };
    let (first, last) = (first.trim(), last.trim());
    match (number(first), number(last)) {
        // `-n`: the last n bytes.
        (None, Some(count)) if first.is_empty() => match count.min(size) {
            0 => Wanted::Nothing,
            count => Wanted::Part(ByteRange::new(size - count, size)),
        },
        (Some(start), None) if last.is_empty() => from(start, u64::MAX, size),
        (Some(start), Some(end)) if start <= end => from(start, end, size),
        _ => Wanted::Whole,
    }
}

fn from(first: u64, last: u64, size: u64) -> Wanted {
    if first >= size {
        return Wanted::Nothing;
    }
    Wanted::Part(ByteRange::new(first, last.saturating_add(1).min(size)))
}

/// What stands behind `bytes=`; range units are case-insensitive (RFC 9110, section 14.1).
fn bytes_unit(header: &str) -> Option<&str> {
    let (unit, spec) = header.split_once('=')?;
    unit.trim().eq_ignore_ascii_case("bytes").then_some(spec)
}

/// A run of digits; one too large for 64 bits lies behind every end.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_cut_at_the_end() {
        for (header, expected) in [
            ("bytes=0-0", Wanted::Part(ByteRange::new(0, 1))),
            ("bytes=2-5", Wanted::Part(ByteRange::new(2, 6))),
            ("Bytes=2-", Wanted::Part(ByteRange::new(2, 10))),
            ("bytes=2-99", Wanted::Part(ByteRange::new(2, 10))),
            (
                "bytes=9-18446744073709551615",
                Wanted::Part(ByteRange::new(9, 10)),
            ),
            (
                "bytes=0-99999999999999999999999",
                Wanted::Part(ByteRange::new(0, 10)),
            ),
            ("bytes=-3", Wanted::Part(ByteRange::new(7, 10))),
            ("bytes=-30", Wanted::Part(ByteRange::new(0, 10))),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=10-12", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
        ] {
            assert_eq!(wanted(Some(header), 10), expected, "{header}");
        }
        assert_eq!(wanted(Some("bytes=0-"), 0), Wanted::Nothing);
    }

    #[test]
    fn what_is_not_one_range_of_bytes_is_ignored() {
        for header in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-2",
            "bytes=a-b",
            "bytes=+1-2",
            "bytes=0-1,4-5",
            "items=0-1",
            "bytes=1--2",
        ] {
            assert_eq!(wanted(Some(header), 10), Wanted::Whole, "{header}");
        }
        assert_eq!(wanted(None, 10), Wanted::Whole);
    }
}
