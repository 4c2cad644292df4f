//! Squares of 16 rows of 16 numbers of 32 bits, turned over in registers.

use std::arch::x86_64::*;

/// Column `i` of `rows` becomes row `i`.
///
/// # Safety
/// The processor has AVX-512F.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // SAFETY: as the caller says.
    unsafe {
        let zero = _mm512_setzero_si512();
        let (mut pairs, mut fours, mut out) = ([zero; 16], [zero; 16], [zero; 16]);
        for i in (0..16).step_by(2) {
            pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        // Lane l of fours[i + c] has column 4l + c of rows i to i + 3.
        for i in (0..16).step_by(4) {
            fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        for c in 0..4 {
            let (a, b) = (fours[c], fours[c + 4]);
            let (d, e) = (fours[c + 8], fours[c + 12]);
            let even = (
                _mm512_shuffle_i32x4::<0x88>(a, b),
                _mm512_shuffle_i32x4::<0x88>(d, e),
            );
            let odd = (
                _mm512_shuffle_i32x4::<0xdd>(a, b),
                _mm512_shuffle_i32x4::<0xdd>(d, e),
            );
            out[c] = _mm512_shuffle_i32x4::<0x88>(even.0, even.1);
            out[c + 4] = _mm512_shuffle_i32x4::<0x88>(odd.0, odd.1);
            out[c + 8] = _mm512_shuffle_i32x4::<0xdd>(even.0, even.1);
            out[c + 12] = _mm512_shuffle_i32x4::<0xdd>(odd.0, odd.1);
        }
        out
    }
}
