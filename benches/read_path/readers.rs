//! How files are read, the same for every contestant.

use crate::common::seconds;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A way to read a whole file; returns the bytes that it got.
pub(crate) type Read = fn(&File) -> u64;

/// The ways in which engines read weights.
pub(crate) const WAYS: [(&str, Read); 3] = [
    ("read()", sequential),
    ("mmap", mapped),
    ("mmap, each MiB backwards", mapped_backwards),
];

const PIECE: usize = 1 << 20;
const PAGE: usize = 4 << 10;

/// Reads a file from front to back, 1 MiB at a time.
pub(crate) fn sequential(file: &File) -> u64 {
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    loop {
        let count = file.read_at(&mut buffer, at).unwrap();
        if count == 0 {
            return at;
        }
        at += count as u64;
    }
}

/// Maps a file and copies it out page by page from front to back.
pub(crate) fn mapped(file: &File) -> u64 {
    copy_out(file, |to, from| {
        let pages = to.chunks_mut(PAGE).zip(from.chunks(PAGE));
        pages.for_each(|(to, from)| to.copy_from_slice(from));
    })
}

/// Maps a file and copies it out MiB by MiB, each from its last page to its first. That is what glibc's memcpy does with large pieces
/// when source and destination lie alike within their pages (`memmove-vec-unaligned-erms.S`, "4k aliasing"), so loaders do it
/// without knowing.
fn mapped_backwards(file: &File) -> u64 {
    copy_out(file, |to, from| {
        let pages = to.chunks_mut(PAGE).zip(from.chunks(PAGE));
        pages.rev().for_each(|(to, from)| to.copy_from_slice(from));
    })
}

/// Maps a file and has `copy` copy each MiB of it.
fn copy_out(file: &File, copy: impl Fn(&mut [u8], &[u8])) -> u64 {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that nobody writes.
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            size,
            ProtFlags::READ,
            MapFlags::PRIVATE,
            file,
            0,
        )
    }
    .unwrap();
    // SAFETY: the mapping is `size` bytes long, readable and not written by anybody until it is removed below.
    let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), size) };
    let mut buffer = vec![0; PIECE];
    for piece in bytes.chunks(PIECE) {
        copy(&mut buffer[..piece.len()], piece);
        std::hint::black_box(&buffer);
    }
    // SAFETY: the mapping made above; `bytes` is not used any more.
    unsafe { munmap(start, size) }.unwrap();
    size as u64
}

/// `count` places for pieces of `length` bytes, the same in each run.
pub(crate) fn places(size: u64, length: u64, count: usize) -> Vec<(u64, u64)> {
    let mut state = 88_172_645_463_325_252_u64;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % (size - length), length)
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Reads these ranges, each an offset and a length, one after the other.
pub(crate) fn ranges(file: &File, places: &[(u64, u64)]) -> u64 {
    let most = places.iter().map(|(_, length)| *length).max().unwrap_or(0);
    let mut buffer = vec![0; most as usize];
    for (offset, length) in places {
        file.read_exact_at(&mut buffer[..*length as usize], *offset)
            .unwrap();
    }
    places.iter().map(|(_, length)| length).sum()
}

/// The first argument that makes this program a reader process.
const READER: &str = "--as-reader";

/// Does what [`processes`] started this process for, if it did.
pub(crate) fn is_reader_process() -> bool {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(READER) {
        return false;
    }
    mapped(&File::open(arguments.next().unwrap()).unwrap());
    true
}

/// Seconds until `count` processes have each mapped and copied out the whole file.
pub(crate) fn processes(file: &Path, count: usize) -> f64 {
    let program = std::env::current_exe().unwrap();
    seconds(|| {
        let spawn = |_| {
            let mut command = Command::new(&program);
            command.arg(READER).arg(file).stdout(Stdio::null());
            command.spawn().unwrap()
        };
        let children: Vec<Child> = (0..count).map(spawn).collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
    })
}
