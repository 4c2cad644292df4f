//! What the fuzzer calls. A panic is a finding.

use std::path::Path;

use super::{Values, file, mount_options, parse};

/// A settings file, `-o` options, and single values.
pub fn settings(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut values = Values::default();
    if let Err(error) = file::parse(&text, Path::new("/etc/ocifs/config.toml"), &mut values) {
        assert!(!error.to_string().is_empty());
    }
    for option in mount_options(&text) {
        // Nobody goes on behind a mistake, which takes long to explain.
        if values.option(option).is_err() {
            break;
        }
    }
    let items = parse::split(&text);
    assert!(items.iter().map(String::len).sum::<usize>() <= text.len());
    if let Ok(span) = parse::duration(&text) {
        assert!(span.as_secs() <= 31_622_400);
        let again = format!("{}ms", span.as_millis());
        assert_eq!(parse::duration(&again), Ok(span));
    }
    for read in [parse::cache_size, parse::memory] {
        if let Ok(bytes) = read(&text) {
            assert!((16 << 20..=1 << 62).contains(&bytes));
        }
    }
}
