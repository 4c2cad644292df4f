//! What a packager tells of a file beside its name and its bytes: when it was changed, and whether it is a program.
//!
//! Owners and the other modes are not shown: everybody who may enter the mount may read everything in it, and nobody may write.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::created;
use super::manifest::Descriptor;

/// The first second of the year 10000, which no program can print.
const END_OF_TIME: u64 = 253_402_300_800;
/// The owner may execute it.
const EXECUTE: u32 = 0o100;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Stamp {
    /// Seconds since 1970; `None` where nobody tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    modified: Option<u64>,
    /// Whether it may be executed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) executable: bool,
}

impl Stamp {
    /// From the fields of a header. The beginning of 1970 is what packagers write who tell no time.
    pub(super) fn new(modified: Option<u64>, mode: u32) -> Self {
        Self {
            modified: modified.filter(|time| (1..END_OF_TIME).contains(time)),
            executable: mode & EXECUTE != 0,
        }
    }

    /// From RFC 3339 and a mode.
    pub(super) fn of_text(modified: &str, mode: u32) -> Self {
        let time = created::parse(modified);
        let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self::new(since.map(|since| since.as_secs()), mode)
    }

    /// What the annotations of a layer that is one file tell: ModelPack's file metadata, which Docker writes too
    /// (model-spec specs-go/v1/annotations.go).
    pub(super) fn of_layer(layer: &Descriptor) -> Self {
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Metadata {
            mode: u32,
            mtime: String,
        }
        let json = layer
            .annotation("org.cncf.model.file.metadata+json")
            .or_else(|| layer.annotation("org.cnai.model.file.metadata+json"));
        let metadata: Option<Metadata> = json.and_then(|json| serde_json::from_str(json).ok());
        let Metadata { mode, mtime } = metadata.unwrap_or_default();
        Self::of_text(&mtime, mode)
    }

    /// Whether nothing is told.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// When the file was changed, where somebody tells.
    pub(super) fn modified(&self) -> Option<SystemTime> {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(self.modified?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Manifest;

    #[test]
    fn what_is_told_is_believed_within_reason() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(Stamp::new(Some(7), 0o644).modified(), Some(at(7)));
        for never in [None, Some(0), Some(END_OF_TIME), Some(u64::MAX)] {
            assert_eq!(Stamp::new(never, 0o644), Stamp::default());
        }
        assert!(Stamp::new(None, 0o755).executable && !Stamp::new(None, 0o666).executable);
        assert_eq!(
            Stamp::of_text("2025-01-01T00:00:00Z", 0).modified(),
            Some(at(1_735_689_600))
        );
    }

    #[test]
    fn annotations_of_both_spellings_are_read() {
        for org in ["cncf", "cnai"] {
            let key = format!("org.{org}.model.file.metadata+json");
            let of = |json: &str| {
                let manifest = Manifest::for_tests(&[("", 1, &[(&key, json)])]);
                Stamp::of_layer(&manifest.layers[0])
            };
            let told = of(r#"{"name":"a","mode":493,"mtime":"2025-01-01T01:00:00+01:00"}"#);
            assert_eq!(told, Stamp::new(Some(1_735_689_600), 0o755));
            for odd in [
                "",
                "[]",
                r#"{"mode":"x"}"#,
                r#"{"mtime":"0001-01-01T00:00:00Z"}"#,
            ] {
                assert!(of(odd).is_empty(), "{odd}");
            }
        }
    }
}
