//! Many rows of x times rows of W in bf16, with AMX: tiles of 16 rows of 64 bytes, and products of pairs of bf16 that are added up in f32.
//!
//! An f32 is the sum of three bf16 of eight bits each, exactly, and so is the product of x with W the sum of three such products: nothing is
//! rounded but sums, as with any f32 product. Where AMX has subnormal numbers for zero, nothing is lost that an f32 sum would show.
//!
//! Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3, describes the tiles; the kernel's Documentation/arch/x86/xstate.rst
//! how a process asks for them.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::sync::OnceLock;

use half::bf16;

use super::transpose::transpose;

/// Columns that a tile of x and W has: 64 bytes of bf16.
const COLUMNS: usize = 32;
/// Rows of x, and of W, that a block has: two tiles of each, and four sums of them, are all eight tiles that there are.
pub(in crate::runner) const ROWS: usize = 32;
/// Numbers that a tile of bf16 has.
const TILE: usize = 16 * COLUMNS;
/// Terms that an f32 is the sum of.
const TERMS: usize = 3;
/// Tiles of columns that are multiplied before the next ones: a block of x has 384 KiB of them.
const DEPTH: usize = 64;

thread_local! {
    /// Some rows of W as tiles: `[block][step][half]`.
    static PACKED: RefCell<Vec<u16>> = const { RefCell::new(Vec::new()) };
}

/// Whether this processor has AMX for bf16 and the kernel lets this process use it.
pub(super) fn usable() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` and `XFEATURE_XTILE_DATA` of the kernel.
    const REQUEST: libc::c_ulong = 0x1023;
    const TILES: libc::c_ulong = 18;
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx;
        let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
        bf16 == 1
            && tile == 1
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            // SAFETY: the call takes two numbers; it changes how much of a thread's state the kernel keeps.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILES) } == 0
    })
}

/// `LDTILECFG`'s operand.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles are there for this thread as long as this is.
struct Tiles;

impl Tiles {
    /// # Safety
    /// AMX is [`usable`].
    unsafe fn begin() -> Self {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        shapes.row_bytes[..8].fill(64);
        shapes.rows[..8].fill(16);
        // SAFETY: AMX is there, and palette 1 has eight tiles of this shape at most.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there, or there would be no `Tiles`. Without it the kernel would keep 8 KiB more of this thread at each switch.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Rows of W that fit into half of a second-level cache of 2 MiB, which processors with AMX have; the rest is for x, each block of which is
/// multiplied with all of them.
pub(in crate::runner) fn group(k: usize) -> usize {
    (1 << 20) / (2 * k.min(DEPTH * COLUMNS)) / ROWS * ROWS
}

/// How many numbers the tiles of `rows` rows of x have.
pub(in crate::runner) fn packed(rows: usize, k: usize) -> usize {
    rows.div_ceil(ROWS) * k.div_ceil(COLUMNS) * TERMS * 2 * TILE
}

/// Writes up to [`ROWS`] rows of x as tiles, `[step][term][half]`; what is missing to full tiles is zero.
///
/// # Safety
/// AMX is [`usable`].
pub(in crate::runner) unsafe fn pack(x: &[f32], k: usize, out: &mut [u16]) {
    assert_eq!(out.len(), packed(ROWS, k));
    // SAFETY: as the caller says.
    unsafe { split(x, k, out) }
}

/// # Safety
/// The processor has AVX-512BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn split(x: &[f32], k: usize, out: &mut [u16]) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for (step, tiles) in out.chunks_exact_mut(TERMS * 2 * TILE).enumerate() {
        for row in 0..ROWS {
            for half in 0..2 {
                let column = step * COLUMNS + half * 16;
                let there = if row < x.len() / k {
                    k.saturating_sub(column).min(16)
                } else {
                    0
                };
                let mask = ((1_u32 << there) - 1) as u16;
                // SAFETY: only what the mask says is read, which is in the row; the tiles of this step have the rows that are written.
                unsafe {
                    let at = x.as_ptr().wrapping_add(row * k + column);
                    let mut rest = _mm512_maskz_loadu_ps(mask, at);
                    for term in 0..TERMS {
                        // Cut off, not rounded: what is left then has eight bits less, and an infinity does not come of a large number.
                        let bits = _mm512_and_si512(_mm512_castps_si512(rest), upper);
                        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(bits));
                        let narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
                        let tile = (term * 2 + row / 16) * TILE;
                        let at = tile + row % 16 * COLUMNS + half * 16;
                        _mm256_storeu_si256(tiles.as_mut_ptr().add(at).cast(), narrow);
                    }
                }
            }
        }
    }
}

/// Writes `x[i] · w[j]` to `out[i * stride + j]`, for `m` rows of x that [`pack`] has made tiles of, a block of [`ROWS`] after the other, and all
/// rows of W; both have `k` columns.
///
/// # Safety
/// AMX is [`usable`]; `out` can be written at all these places, and nobody else does so.
pub(in crate::runner) unsafe fn block(
    x: &[u16],
    w: &[bf16],
    (m, k): (usize, usize),
    out: *mut f32,
    stride: usize,
) {
    assert_eq!(x.len(), packed(m, k));
    let (n, steps) = (w.len() / k, k.div_ceil(COLUMNS));
    PACKED.with_borrow_mut(|packed| {
        let of_block = DEPTH.min(steps) * 2 * TILE;
        let needed = n.div_ceil(ROWS) * of_block;
        packed.resize(packed.len().max(needed), 0);
        // SAFETY: as the caller says.
        let _tiles = unsafe { Tiles::begin() };
        for first in (0..steps).step_by(DEPTH) {
            let depth = DEPTH.min(steps - first);
            for (w, packed) in w.chunks(ROWS * k).zip(packed.chunks_exact_mut(of_block)) {
                // SAFETY: AVX-512BW is there where AMX is usable.
                unsafe { turn(w, k, first, &mut packed[..depth * 2 * TILE]) };
            }
            for (i, x) in x.chunks_exact(steps * TERMS * 2 * TILE).enumerate() {
                for j in 0..n.div_ceil(ROWS) {
                    let (rows, columns) = ((m - i * ROWS).min(ROWS), (n - j * ROWS).min(ROWS));
                    let (x, w) = (&x[first * TERMS * 2 * TILE..], &packed[j * of_block..]);
                    // SAFETY: `depth` steps of x and W are there, and rows and columns of `out` from here.
                    unsafe {
                        let out = out.add(i * ROWS * stride + j * ROWS);
                        if rows == ROWS && columns == ROWS {
                            multiply(x, w, depth, out, stride, first > 0);
                        } else {
                            let mut whole = [0.0; ROWS * ROWS];
                            multiply(x, w, depth, whole.as_mut_ptr(), ROWS, false);
                            for (row, sums) in whole.chunks_exact(ROWS).take(rows).enumerate() {
                                for (column, sum) in sums.iter().take(columns).enumerate() {
                                    let out = out.add(row * stride + column);
                                    *out = if first > 0 { *out + sum } else { *sum };
                                }
                            }
                        }
                    }
                }
            }
        }
    });
}

/// Writes up to [`ROWS`] rows of W as tiles, from step `first` on: `[step][half]`, of each the pairs of one column after the other.
///
/// # Safety
/// The processor has AVX-512BW.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn turn(w: &[bf16], k: usize, first: usize, out: &mut [u16]) {
    /// Bytes that a row is asked for before they are read: rows are far apart, and too many for the processor to see each as a sequence.
    const AHEAD: usize = 512;
    let there = w.len() / k;
    for (step, tiles) in out.chunks_exact_mut(2 * TILE).enumerate() {
        let column = (first + step) * COLUMNS;
        let mask = u32::MAX >> (COLUMNS - (k - column).min(COLUMNS));
        for half in 0..2 {
            // SAFETY: only what the mask says is read, which is in the row; asking for memory is no reading. A tile has 16 rows of 32.
            unsafe {
                let mut rows = [_mm512_setzero_si512(); 16];
                for (j, row) in rows.iter_mut().enumerate() {
                    if half * 16 + j < there {
                        let at = w.as_ptr().add((half * 16 + j) * k + column);
                        *row = _mm512_maskz_loadu_epi16(mask, at.cast());
                        _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(AHEAD));
                    }
                }
                for (i, row) in transpose(rows).into_iter().enumerate() {
                    let at = half * TILE + i * COLUMNS;
                    _mm512_storeu_si512(tiles.as_mut_ptr().add(at).cast(), row);
                }
            }
        }
    }
}

/// The sums of a block, written to `out` or (`more`) added to it.
///
/// # Safety
/// Tiles are there; x and W have this many steps, and `out` [`ROWS`] rows of as many columns.
unsafe fn multiply(x: &[u16], w: &[u16], steps: usize, out: *mut f32, stride: usize, more: bool) {
    assert!(steps > 0 && x.len() >= steps * TERMS * 2 * TILE && w.len() >= steps * 2 * TILE);
    // SAFETY: `out` is as the caller says.
    let below = unsafe { out.add(16 * stride) };
    // SAFETY: the tiles that are loaded are within x, W and `out`, and those that are stored within `out`; all tiles are named.
    unsafe {
        asm!(
            "test {more}, {more}",
            "jz 3f",
            "tileloadd tmm0, [{out} + {stride}]",
            "tileloadd tmm1, [{out} + {stride} + 64]",
            "tileloadd tmm2, [{below} + {stride}]",
            "tileloadd tmm3, [{below} + {stride} + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{w} + {row}]",
            "tileloadd tmm5, [{w} + {row} + 1024]",
            "tileloadd tmm6, [{x} + {row}]",
            "tileloadd tmm7, [{x} + {row} + 1024]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            "tileloadd tmm6, [{x} + {row} + 2048]",
            "tileloadd tmm7, [{x} + {row} + 3072]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            "tileloadd tmm6, [{x} + {row} + 4096]",
            "tileloadd tmm7, [{x} + {row} + 5120]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tdpbf16ps tmm1, tmm6, tmm5",
            "tdpbf16ps tmm2, tmm7, tmm4",
            "tdpbf16ps tmm3, tmm7, tmm5",
            "add {x}, 6144",
            "add {w}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {stride}], tmm0",
            "tilestored [{out} + {stride} + 64], tmm1",
            "tilestored [{below} + {stride}], tmm2",
            "tilestored [{below} + {stride} + 64], tmm3",
            more = in(reg) u64::from(more),
            x = inout(reg) x.as_ptr() => _,
            w = inout(reg) w.as_ptr() => _,
            steps = inout(reg) steps => _,
            out = in(reg) out,
            below = in(reg) below,
            stride = in(reg) stride * 4,
            row = in(reg) 64usize,
            out("tmm0") _,
            out("tmm1") _,
            out("tmm2") _,
            out("tmm3") _,
            out("tmm4") _,
            out("tmm5") _,
            out("tmm6") _,
            out("tmm7") _,
            options(nostack)
        );
    }
}
