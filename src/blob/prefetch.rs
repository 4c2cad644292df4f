//! What to fetch ahead of a blob's readers. Pure: reads go in, a range to fetch comes out.
//!
//! The state belongs to the blob, not to a file handle: threads, tensor-parallel ranks and page faults of several
//! processes share handles or have many, and what matters is where on the blob each of them moves on. A read that begins
//! near where an earlier one ended carries that stream on, and so does one that ends where an earlier one began. Its window
//! starts small and doubles each time the reader has used up half of it; a reader that jumps about (a header here, a tensor
//! there) never gets one.

use std::time::Duration;

use crate::base::ByteRange;

/// Streams that are told apart on one blob; the one that was idle the longest makes room for a new one.
const STREAMS: usize = 16;
/// A read this close behind or before the end of a stream belongs to it: the kernel's read-ahead reorders requests.
const SLACK: u64 = 512 << 10;
/// A stream gets a window once this much was read in order: more than a safetensors header and the odd small tensor.
const EARNEST: u64 = 512 << 10;
/// The first window, where the link is short: more on one that takes long to answer and carries much meanwhile.
const FIRST_WINDOW: u64 = 2 << 20;
/// No first window is larger, for a reader that shows up once may not come again.
const LARGEST_FIRST: u64 = 16 << 20;
/// The largest window, where the link is short: twice what a few connections carry at a time.
const LARGEST_WINDOW: u64 = 64 << 20;
/// No window is larger.
const LONGEST_WINDOW: u64 = 512 << 20;
/// A reader that read this much in order wants everything.
const EVERYTHING: u64 = 16 << 20;
/// So do readers who read this part of the blob together, each piece in order.
const MOST_OF_IT: u64 = 8;
/// The largest piece that is read backwards: the C library copies up to so much that way when source and destination lie
/// unluckily (glibc, `L(more_8x_vec_backward)` below its non-temporal threshold).
const LARGEST_PIECE: u64 = 32 << 20;

/// What a read asks of the prefetcher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Advice {
    /// Fetch what is missing of this range; it may hold the read itself.
    pub(super) ahead: Option<ByteRange>,
    /// A reader has shown that it wants the whole blob.
    pub(super) everything: bool,
}

/// How far ahead of one reader to fetch, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// The first window.
    pub(super) first: u64,
    /// The largest window.
    pub(super) most: u64,
}

impl Reach {
    /// For a link that answers after `latency` and carries `rate` bytes in a second: what it carries while it takes to
    /// answer, a quarter of it at first, and eight times as much for a reader that goes on, so that a window that is
    /// asked for when half of the last is used up comes before the other half is.
    pub(super) fn of(latency: Duration, rate: u64) -> Self {
        let flying = latency.as_secs_f64() * rate as f64;
        Self {
            first: ((flying / 4.0) as u64).clamp(FIRST_WINDOW, LARGEST_FIRST),
            most: ((flying * 8.0) as u64).clamp(LARGEST_WINDOW, LONGEST_WINDOW),
        }
    }

    /// The same with windows of at most `most` bytes.
    pub(super) fn at_most(self, most: u64) -> Self {
        Self {
            first: self.first.min(most),
            most: self.most.min(most),
        }
    }
}

/// The readers of one blob.
#[derive(Debug, Default)]
pub(super) struct Prefetcher {
    streams: Vec<Stream>,
    clock: u64,
    /// Bytes read in order by all streams, those that are forgotten counted.
    earnest: u64,
}

#[derive(Debug)]
struct Stream {
    /// Up to here it was read: where a reader that goes forwards comes next.
    next: u64,
    /// Down to here it was read since `next` moved last: where one that goes backwards comes next.
    low: u64,
    /// Bytes read in order.
    run: u64,
    window: u64,
    /// Fetched or being fetched up to here.
    issued: u64,
    /// And down to here, when that is below `low`.
    issued_low: u64,
    used: u64,
}

impl Stream {
    fn begin(range: ByteRange, clock: u64) -> Self {
        Self {
            next: range.end(),
            low: range.start(),
            run: range.len(),
            window: 0,
            issued: 0,
            issued_low: range.start(),
            used: clock,
        }
    }

    /// How far `range` is from where the stream goes on, forwards; `None` when it does not belong there.
    ///
    /// Who went backwards through a piece jumps over the whole of the next one.
    fn distance_up(&self, range: ByteRange) -> Option<u64> {
        let slack = SLACK.max((self.next - self.low).min(LARGEST_PIECE));
        let near = range.start() <= self.next.saturating_add(slack)
            && range.start().saturating_add(SLACK) >= self.next;
        near.then(|| self.next.abs_diff(range.start()))
    }

    /// The same backwards.
    fn distance_down(&self, range: ByteRange) -> Option<u64> {
        let near = range.start() < self.low
            && range.end() <= self.low.saturating_add(SLACK)
            && range.end().saturating_add(SLACK) >= self.low;
        near.then(|| self.low.abs_diff(range.end()))
    }

    fn distance(&self, range: ByteRange) -> Option<u64> {
        match (self.distance_up(range), self.distance_down(range)) {
            (Some(up), Some(down)) => Some(up.min(down)),
            (up, down) => up.or(down),
        }
    }

    /// A read further on.
    fn up(&mut self, range: ByteRange, size: u64, reach: Reach) -> Option<ByteRange> {
        let hole = self.next.min(range.start());
        if range.end() > self.next {
            self.next = range.end();
            self.low = range.start();
            self.issued_low = hole;
        }
        if self.run < EARNEST {
            return None;
        }
        let ahead = self.issued.saturating_sub(self.next);
        if self.window != 0 && ahead > self.window / 2 {
            return None;
        }
        self.widen(reach);
        let from = self.issued.max(hole).min(size);
        self.issued = self.next.saturating_add(self.window).min(size);
        Some(ByteRange::new(from, self.issued.max(from)))
    }

    /// A read further back.
    fn down(&mut self, range: ByteRange, reach: Reach) -> Option<ByteRange> {
        self.low = range.start();
        if self.run < EARNEST {
            return None;
        }
        let ahead = self.low.saturating_sub(self.issued_low);
        if self.window != 0 && ahead > self.window / 2 {
            return None;
        }
        self.widen(reach);
        let to = self.issued_low.min(range.end());
        self.issued_low = self.low.saturating_sub(self.window);
        Some(ByteRange::new(self.issued_low.min(to), to))
    }

    fn widen(&mut self, reach: Reach) {
        self.window = (self.window * 2).max(reach.first).min(reach.most);
    }
}

impl Prefetcher {
    /// Takes note of a read of `range` on a blob of `size` bytes, and reaches so far ahead.
    pub(super) fn read(&mut self, range: ByteRange, size: u64, reach: Reach) -> Advice {
        self.clock += 1;
        let nearest = self
            .streams
            .iter_mut()
            .filter_map(|stream| Some((stream.distance(range)?, stream)))
            .min_by_key(|(distance, _)| *distance);
        let Some((_, stream)) = nearest else {
            self.begin(range);
            return Advice::default();
        };
        stream.used = self.clock;
        // Only new ground counts, so that reading the same header again and again is no stream; and only what is read
        // of it, so that two reads that happen to lie near each other are none.
        let forwards = stream.distance_up(range).is_some() && range.end() > stream.next
            || stream.distance_down(range).is_none();
        let fresh = if forwards {
            range.end().saturating_sub(stream.next)
        } else {
            stream.low - range.start()
        }
        .min(range.len());
        stream.run += fresh;
        if stream.run >= EARNEST {
            self.earnest += fresh;
        }
        let ahead = if forwards {
            stream.up(range, size, reach)
        } else {
            stream.down(range, reach)
        };
        Advice {
            ahead: ahead.filter(|ahead| !ahead.is_empty()),
            everything: stream.run >= EVERYTHING
                || self.earnest >= EVERYTHING.max(size / MOST_OF_IT),
        }
    }

    /// What was to be fetched ahead from `at` on is not being fetched.
    pub(super) fn cut(&mut self, at: u64) {
        for stream in &mut self.streams {
            stream.issued = stream.issued.min(at.max(stream.next));
            if (stream.issued_low..stream.low).contains(&at) {
                stream.issued_low = stream.low;
            }
        }
    }

    fn begin(&mut self, range: ByteRange) {
        if self.streams.len() == STREAMS
            && let Some(oldest) = (0..STREAMS).min_by_key(|&at| self.streams[at].used)
        {
            self.streams.swap_remove(oldest);
        }
        self.streams.push(Stream::begin(range, self.clock));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 1 << 30;
    /// A link of no length.
    const SHORT: Reach = Reach {
        first: FIRST_WINDOW,
        most: LARGEST_WINDOW,
    };

    #[test]
    fn a_long_link_gets_larger_windows_within_bounds() {
        let millis = Duration::from_millis;
        assert_eq!(Reach::of(millis(0), 0), SHORT);
        assert_eq!(Reach::of(millis(1), 1_000_000_000), SHORT);
        // 50 ms at 1 GB/s: 50 MB fly.
        let long = Reach::of(millis(50), 1_000_000_000);
        assert_eq!((long.first, long.most), (12_500_000, 400_000_000));
        let longest = Reach::of(Duration::from_secs(10), u64::MAX);
        assert_eq!((longest.first, longest.most), (16 << 20, 512 << 20));
        assert_eq!(
            long.at_most(MIB),
            Reach {
                first: MIB,
                most: MIB
            }
        );
        let mut prefetcher = Prefetcher::default();
        let mut largest = 0;
        for at in (0..SIZE).step_by(128 << 10) {
            let read = prefetcher.read(ByteRange::at(at, 128 * KIB), SIZE, long);
            largest = largest.max(read.ahead.map_or(0, |ahead| ahead.end() - at));
        }
        assert!((300 * MIB..=400 * MIB).contains(&largest), "{largest}");
    }

    #[test]
    fn what_is_not_fetched_after_all_is_advised_again() {
        let mut prefetcher = Prefetcher::default();
        let mut ahead = None;
        let mut at = 0;
        while ahead.is_none() {
            ahead = prefetcher
                .read(ByteRange::at(at, 128 * KIB), SIZE, SHORT)
                .ahead;
            at += 128 * KIB;
        }
        let ahead = ahead.unwrap();
        prefetcher.cut(ahead.start());
        let again = prefetcher.read(ByteRange::at(at, 128 * KIB), SIZE, SHORT);
        assert!(again.ahead.unwrap().start() <= at);
    }

    /// Reads `len` bytes from `start` in steps as the kernel sends them; returns the end of what was asked for ahead.
    fn stream(prefetcher: &mut Prefetcher, start: u64, len: u64) -> (u64, bool) {
        let (mut end, mut everything) = (0, false);
        for at in (start..start + len).step_by(128 << 10) {
            let advice = prefetcher.read(ByteRange::at(at, 128 * KIB), SIZE, SHORT);
            if let Some(ahead) = advice.ahead {
                assert!(
                    end == 0 || ahead.start() == end,
                    "the windows of a stream join"
                );
                end = ahead.end();
            }
            everything |= advice.everything;
            assert!(
                end == 0 || end > at + 128 * KIB,
                "the window stays ahead of the reader"
            );
        }
        (end, everything)
    }

    #[test]
    fn a_sequential_reader_gets_a_growing_window() {
        let mut prefetcher = Prefetcher::default();
        assert_eq!(stream(&mut prefetcher, 0, 256 * KIB), (0, false));
        let (end, _) = stream(&mut prefetcher, 256 * KIB, MIB);
        assert!((2 * MIB..6 * MIB).contains(&end), "{end}");
        let (end, everything) = stream(&mut prefetcher, MIB + 256 * KIB, 100 * MIB);
        assert!(
            end - 101 * MIB > 30 * MIB && end - 101 * MIB <= LARGEST_WINDOW + MIB,
            "{end}"
        );
        assert!(everything);
    }

    #[test]
    fn a_sparse_reader_gets_nothing() {
        let mut prefetcher = Prefetcher::default();
        for index in 0..1000u64 {
            let at = index * 7_919 % 1000 * MIB;
            assert_eq!(
                prefetcher.read(ByteRange::at(at, 64 * KIB), SIZE, SHORT),
                Advice::default()
            );
        }
        for _ in 0..1000 {
            assert_eq!(
                prefetcher.read(ByteRange::at(0, 64 * KIB), SIZE, SHORT),
                Advice::default(),
                "the same header"
            );
        }
    }

    #[test]
    fn random_reads_that_happen_to_be_neighbours_are_no_stream() {
        let mut prefetcher = Prefetcher::default();
        let mut state = 1u64;
        let mut asked = 0;
        for _ in 0..500 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (state >> 33) % (256 * MIB - 64 * KIB);
            let advice = prefetcher.read(ByteRange::at(at, 64 * KIB), 256 * MIB, SHORT);
            asked += advice.ahead.map_or(0, |ahead| ahead.len());
        }
        assert_eq!(asked, 0);
    }

    #[test]
    fn interleaved_readers_each_have_their_own_window() {
        let mut prefetcher = Prefetcher::default();
        let mut ends = [0; 8];
        for step in 0..64 {
            for (reader, end) in ends.iter_mut().enumerate() {
                let at = reader as u64 * 100 * MIB + step * 128 * KIB;
                if let Some(ahead) = prefetcher
                    .read(ByteRange::at(at, 128 * KIB), SIZE, SHORT)
                    .ahead
                {
                    *end = ahead.end();
                }
            }
        }
        for (reader, end) in ends.into_iter().enumerate() {
            assert!(end > reader as u64 * 100 * MIB + 8 * MIB, "{reader}: {end}");
        }
    }

    #[test]
    fn requests_that_the_kernel_reorders_are_one_stream() {
        let mut prefetcher = Prefetcher::default();
        let mut asked = 0;
        for pair in 0..40 {
            for at in [2 * pair + 1, 2 * pair] {
                asked += prefetcher
                    .read(ByteRange::at(at * 128 * KIB, 128 * KIB), SIZE, SHORT)
                    .ahead
                    .map_or(0, |a| a.len());
            }
        }
        assert_eq!(prefetcher.streams.len(), 1);
        assert!(asked > 8 * MIB);
    }

    #[test]
    fn pieces_that_are_read_backwards_are_one_stream() {
        for piece in [MIB, 8 * MIB] {
            let mut prefetcher = Prefetcher::default();
            let mut here = vec![false; (SIZE / (64 * KIB)) as usize];
            let mut waited = 0;
            let mut everything = false;
            for first in (0..128 * MIB).step_by(piece as usize) {
                for back in 1..=piece / (128 * KIB) {
                    // The kernel reads around a fault.
                    let start = (first + piece - back * 128 * KIB).saturating_sub(64 * KIB);
                    let read = ByteRange::at(start, 128 * KIB);
                    let blocks = |range: ByteRange| {
                        (range.start() / (64 * KIB)) as usize
                            ..range.end().div_ceil(64 * KIB) as usize
                    };
                    waited += u64::from(!here[blocks(read)].iter().all(|&here| here));
                    let advice = prefetcher.read(read, SIZE, SHORT);
                    everything |= advice.everything;
                    here[blocks(read)].fill(true);
                    if let Some(ahead) = advice.ahead {
                        here[blocks(ahead)].fill(true);
                    }
                }
            }
            assert!(waited <= 32, "{piece}: {waited} reads found nothing");
            assert!(everything);
        }
    }

    #[test]
    fn a_blob_that_is_read_from_its_end_is_fetched_from_its_end() {
        let mut prefetcher = Prefetcher::default();
        let mut lowest = SIZE;
        for at in (256 * 8..SIZE / (128 * KIB)).rev().map(|at| at * 128 * KIB) {
            let read = ByteRange::at(at, 128 * KIB);
            let advice = prefetcher.read(read, SIZE, SHORT);
            if let Some(ahead) = advice.ahead {
                assert!(ahead.end() <= read.end(), "nothing above");
                assert!(lowest == SIZE || ahead.end() == lowest, "windows join");
                lowest = ahead.start();
            }
            assert!(lowest == SIZE || lowest < at, "the window stays ahead");
        }
        assert!(lowest <= 256 * MIB - 30 * MIB, "{lowest}");
    }

    #[test]
    fn a_window_ends_with_the_blob() {
        let mut prefetcher = Prefetcher::default();
        let size = 3 * MIB + 5;
        let mut end = 0;
        for at in (0..size).step_by(128 << 10) {
            let read = ByteRange::new(at, (at + 128 * KIB).min(size));
            end = prefetcher
                .read(read, size, SHORT)
                .ahead
                .map_or(end, |ahead| ahead.end());
        }
        assert_eq!(end, size);
    }
}
