//! Decompression of a layer, in one stream and with bounds.

use std::io::{self, BufRead, Read};

/// What may stand between what a stream claims and what it is: gzip reaches 1032 to 1, and models do not come near it.
const LARGEST_RATIO: u64 = 1100;
/// Below this many bytes the ratio is not looked at: short streams of zeros are harmless.
const HARMLESS: u64 = 64 << 20;
/// The largest window of a zstd stream that is given memory, as a power of two: 128 MiB, libzstd's own limit.
const LARGEST_WINDOW: u32 = 27;
/// A window that every stream gets: what zstd takes up to level 19, 8 MiB.
const USUAL_WINDOW: u32 = 23;

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    /// RFC 1952; several members count as one stream.
    Gzip,
    /// RFC 8878; several frames count as one stream, skippable ones are skipped.
    Zstd,
}

impl Compression {
    /// The compression that these first bytes are of.
    pub(super) fn of(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            // A skippable frame comes first in some zstd files (RFC 8878, section 3.1.2).
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            _ => None,
        }
    }

    /// What people call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// A reader of what `source` is compressed from, and which looks back no further than this; every stream may look
    /// back 8 MiB.
    pub(super) fn decoder_within<'a, R: BufRead + 'a>(
        self,
        source: R,
        window: u64,
    ) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => self.decoder(source)?,
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                let log = window.checked_ilog2().unwrap_or(0);
                decoder.window_log_max(log.clamp(USUAL_WINDOW, LARGEST_WINDOW))?;
                Box::new(decoder)
            }
        })
    }

    /// A reader of what `source` is compressed from.
    pub(super) fn decoder<'a, R: BufRead + 'a>(self, source: R) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                decoder.window_log_max(LARGEST_WINDOW)?;
                Box::new(decoder)
            }
        })
    }
}

/// The memory that decompressing a stream takes to look back (RFC 8878, section 3.1.1.1), from how it begins; `None` where that does
/// not tell.
pub(super) fn window(start: &[u8]) -> Option<u64> {
    if Compression::of(start) != Some(Compression::Zstd) {
        return Some(0);
    }
    let log = match start {
        [0x28, 0xb5, 0x2f, 0xfd, descriptor, size, ..] if descriptor & 0x20 == 0 => {
            10 + u32::from(size >> 3) + u32::from(size & 7 != 0)
        }
        // One segment: the window is the content.
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let size = zstd::zstd_safe::get_frame_content_size(start).ok()??;
            size.max(1).next_power_of_two().ilog2()
        }
        _ => return None,
    };
    Some(1 << log.clamp(USUAL_WINDOW, LARGEST_WINDOW))
}

/// What the two ends of a compressed stream tell of its uncompressed size: the size itself, or what is left of it when it is
/// divided by 2^32. It is a claim, and of the last gzip member or the first zstd frame alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    /// The size.
    Size(u64),
    /// The size modulo 2^32 (RFC 1952, `ISIZE`).
    Modulo(u32),
}

impl Claimed {
    /// Bytes of a stream's start that are enough to see it.
    pub(super) const START: u64 = 32;
    /// Bytes of a stream's end that are enough.
    pub(super) const END: u64 = 4;

    /// From the first and the last bytes of a stream.
    pub(super) fn of(start: &[u8], end: &[u8]) -> Option<Self> {
        match Compression::of(start)? {
            Compression::Gzip => {
                let size = end.last_chunk::<4>()?;
                Some(Self::Modulo(u32::from_le_bytes(*size)))
            }
            Compression::Zstd => {
                let size = zstd::zstd_safe::get_frame_content_size(start).ok()??;
                Some(Self::Size(size))
            }
        }
    }

    /// Whether the size may be this.
    pub(super) fn is(self, size: u64) -> bool {
        match self {
            Self::Size(claimed) => claimed == size,
            Self::Modulo(claimed) => claimed == size as u32,
        }
    }
}

/// Whether `made` bytes out of `taken` are more than any layer of a model would have.
pub(super) fn is_bomb(taken: u64, made: u64) -> bool {
    made > HARMLESS && made / LARGEST_RATIO > taken
}

/// Reads a short piece whole: at most `limit` bytes, else an error.
pub(super) fn whole(compression: Compression, piece: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    compression
        .decoder(piece)?
        .take(limit.saturating_add(1))
        .read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::other(format!(
            "it has more than {limit} bytes when it is decompressed"
        )));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn both_formats_are_read_in_one_piece_and_in_several() {
        let parts = [vec![7; 100_000], b"end".to_vec()];
        let streams = [
            parts
                .iter()
                .flat_map(|part| gzip(part))
                .collect::<Vec<u8>>(),
            parts
                .iter()
                .flat_map(|part| zstd::encode_all(&part[..], 1).unwrap())
                .collect(),
            // A skippable frame of three bytes first.
            [
                &[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..],
                &zstd::encode_all(&parts.concat()[..], 1).unwrap(),
            ]
            .concat(),
        ];
        for stream in streams {
            let format = Compression::of(&stream).unwrap();
            assert_eq!(whole(format, &stream, 100_003).unwrap(), parts.concat());
            assert!(whole(format, &stream, 100_002).is_err());
            assert!(whole(format, &stream[..stream.len() - 1], 1 << 20).is_err());
        }
        assert_eq!(Compression::of(b"PK"), None);
        assert_eq!(Compression::of(b""), None);
    }

    #[test]
    fn both_ends_claim_a_size() {
        let content = vec![7; 100_000];
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.set_pledged_src_size(Some(100_000)).unwrap();
        encoder.write_all(&content).unwrap();
        for stream in [gzip(&content), encoder.finish().unwrap()] {
            let claimed = Claimed::of(&stream, &stream[stream.len() - 4..]).unwrap();
            assert!(claimed.is(100_000) && !claimed.is(100_001));
        }
        let streamed = zstd::encode_all(&content[..], 1).unwrap();
        assert_eq!(Claimed::of(&streamed, b"1234"), None);
        // Larger than the field.
        assert!(Claimed::Modulo(5).is((1 << 32) + 5));
        assert_eq!(Claimed::of(b"", b""), None);
    }

    #[test]
    fn how_far_a_stream_looks_back_is_known_from_its_start() {
        let content: Vec<u8> = (0..3_000_000_u32).map(|at| (at >> 3) as u8).collect();
        assert_eq!(window(&gzip(&content)), Some(0));
        let with_window = |log| {
            let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(&content).unwrap();
            encoder.finish().unwrap()
        };
        for (log, takes) in [(20, USUAL_WINDOW), (23, 23), (25, 25), (27, 27)] {
            let stream = with_window(log);
            assert_eq!(window(&stream), Some(1 << takes), "{log}");
            let read = |window| {
                let decoder = Compression::Zstd.decoder_within(&stream[..], window);
                let mut read = Vec::new();
                decoder.unwrap().read_to_end(&mut read).map(|_| read)
            };
            assert_eq!(read(1 << takes).unwrap(), content);
            // What was not asked for is not taken.
            assert_eq!(read(1 << (takes - 1)).is_ok(), log <= USUAL_WINDOW);
        }
        // A skippable frame hides what follows.
        assert_eq!(window(&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0]), None);
    }

    #[test]
    fn bombs_are_told_from_layers() {
        assert!(!is_bomb(0, HARMLESS), "a few zeros");
        assert!(!is_bomb(1 << 20, 1000 << 20), "gzip at its best");
        assert!(is_bomb(1 << 20, 1200 << 20));
        // The best that gzip can do.
        let zeros = vec![0; 8 << 20];
        assert!(!is_bomb(gzip(&zeros).len() as u64 * 100, 800 << 20));
    }
}
