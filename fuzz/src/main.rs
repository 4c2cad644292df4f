//! One libFuzzer binary for all parsers of bytes that come from outside; `OCIFS_FUZZ` names the target. `fuzz/run.sh` builds and
//! runs it.
//!
//! What each target checks stands in `src/*/fuzzing.rs`. Here it is watched beside that none of them takes memory out of
//! proportion to what it was given.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use libfuzzer_sys::fuzz_target;

/// A parser, and what it may take: so much for each byte that it is given, beside [`FREE`].
type Target = (&'static str, fn(&[u8]), usize);

/// What every parser may take.
const FREE: usize = 1 << 20;

const TARGETS: &[Target] = &[
    ("auth-file", ocifs::registry::fuzzing::auth_file, 200),
    ("card", ocifs::pack::fuzzing::card, 200),
    ("challenge", ocifs::registry::fuzzing::challenge, 40),
    ("chunk-map", ocifs::cache::fuzzing::chunk_map, 40),
    // The decoders have windows of their own.
    ("compressed", ocifs::model::fuzzing::compressed, 4000),
    ("config", ocifs::model::fuzzing::config, 200),
    (
        "content-range",
        ocifs::registry::fuzzing::content_range,
        200,
    ),
    ("control", ocifs::mount::fuzzing::control, 40),
    ("gguf", ocifs::pack::fuzzing::gguf, 40),
    ("helper", ocifs::registry::fuzzing::helper, 40),
    ("hosts-toml", ocifs::registry::fuzzing::hosts_toml, 400),
    ("index", ocifs::model::fuzzing::index, 200),
    ("layout", ocifs::serve::fuzzing::layout, 200),
    ("links", ocifs::model::fuzzing::links, 1000),
    ("location", ocifs::registry::fuzzing::location, 100),
    ("manifest", ocifs::model::fuzzing::manifest, 400),
    ("mountinfo", ocifs::mount::fuzzing::mountinfo, 40),
    ("name", ocifs::tree::fuzzing::name, 40),
    ("names", ocifs::model::fuzzing::names, 100),
    ("note", ocifs::model::fuzzing::note, 4000),
    // The regular expressions of oci-client keep tables of what they have seen.
    ("reference", ocifs::registry::fuzzing::reference, 1 << 20),
    ("refusal", ocifs::registry::fuzzing::refusal, 200),
    ("request", ocifs::fuse::fuzzing::request, 40),
    ("safetensors", ocifs::model::fuzzing::safetensors, 100),
    ("serve", ocifs::serve::fuzzing::request, 100),
    ("settings", ocifs::config::fuzzing::settings, 400),
    ("tags", ocifs::registry::fuzzing::tags, 100),
    ("tar", ocifs::model::fuzzing::tar, 1000),
    ("toc", ocifs::model::fuzzing::toc, 4000),
    ("token", ocifs::registry::fuzzing::token, 40),
    ("values", values, 40),
];

/// Digests and sizes as they stand in all kinds of texts; what is printed is read as the same.
fn values(data: &[u8]) {
    use ocifs::base::{ByteSize, Digest};
    let text = String::from_utf8_lossy(data);
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(ByteSize(bytes)) = text.parse() {
        assert!(bytes <= 1 << 62);
        assert_eq!(format!("{bytes}").parse(), Ok(ByteSize(bytes)));
    }
}

/// Counts what is taken from the system's allocator.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn target() -> &'static Target {
    static CHOSEN: OnceLock<&Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let wanted = std::env::var("OCIFS_FUZZ").unwrap_or_default();
        let names: Vec<&str> = TARGETS.iter().map(|(name, ..)| *name).collect();
        let found = TARGETS.iter().find(|(name, ..)| *name == wanted);
        // What is made once, at the first use, is no target's.
        for text in ["a/b:c", "[::1]:5000/a@sha256:x", "\u{e4}"] {
            ocifs::registry::fuzzing::reference(text.as_bytes());
        }
        found.unwrap_or_else(|| panic!("OCIFS_FUZZ must be one of: {}", names.join(" ")))
    })
}

fuzz_target!(|data: &[u8]| {
    let (_, run, factor) = target();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    run(data);
    let taken = PEAK.load(Relaxed).saturating_sub(before);
    assert!(
        taken <= FREE + factor * data.len(),
        "{taken} bytes of memory for {} bytes",
        data.len()
    );
});
