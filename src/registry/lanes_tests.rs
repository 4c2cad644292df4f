//! The number of lanes that is found on simulated links.

use super::*;

const MB: f64 = 1e6;

/// A host: bytes per second in all, with this many requests under way; `None` when it refuses so many.
type Host = dyn Fn(usize) -> Option<f64>;

/// A download that always wants more parts than there are lanes.
struct Sim<'a> {
    host: &'a Host,
    lanes: Lanes,
    start: Instant,
    now: Instant,
    /// Bytes to go of each part under way.
    parts: Vec<f64>,
    delivered: f64,
    /// The limits that were in force, with the seconds that each was.
    history: Vec<(usize, f64)>,
    refusals: usize,
    paused_until: Instant,
    noise: u64,
}

impl<'a> Sim<'a> {
    fn new(host: &'a Host) -> Self {
        let start = Instant::now();
        Self {
            host,
            lanes: Lanes::new(MOST),
            start,
            now: start,
            parts: Vec::new(),
            delivered: 0.0,
            history: Vec::new(),
            refusals: 0,
            paused_until: start,
            noise: 1,
        }
    }

    /// From 0.95 to 1.05.
    fn noise(&mut self) -> f64 {
        self.noise = self
            .noise
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        0.95 + (self.noise >> 40) as f64 / f64::from(1 << 24) * 0.1
    }

    fn run(&mut self, seconds: f64) {
        const STEP: f64 = 0.002;
        let until = self.now + Duration::from_secs_f64(seconds);
        while self.now < until {
            self.now += Duration::from_secs_f64(STEP);
            while self.now >= self.paused_until && self.parts.len() < self.lanes.limit() {
                if (self.host)(self.parts.len() + 1).is_none() {
                    self.refusals += 1;
                    self.lanes.refused(self.now);
                    self.paused_until = self.now + Duration::from_secs(1);
                    break;
                }
                // The first ones are shorter, so that lanes do not end together.
                let shorter = 1.0 / (1 + self.parts.len() % 3) as f64;
                let size = if self.delivered == 0.0 { shorter } else { 1.0 };
                self.parts.push(size * self.lanes.part_size() as f64);
            }
            match self.history.last_mut() {
                Some((limit, time)) if *limit == self.lanes.limit() => *time += STEP,
                _ => self.history.push((self.lanes.limit(), STEP)),
            }
            if self.parts.is_empty() {
                continue;
            }
            let rate = (self.host)(self.parts.len()).unwrap_or(0.0) * self.noise();
            let share = rate * STEP / self.parts.len() as f64;
            for left in &mut self.parts {
                *left -= share;
            }
            self.delivered += rate * STEP;
            let before = self.parts.len();
            self.parts.retain(|left| *left > 0.0);
            for _ in self.parts.len()..before {
                self.lanes.part(self.now, self.delivered as u64);
            }
        }
    }

    /// The limit that was in force for the greater part of the last `seconds`.
    fn settled(&self, seconds: f64) -> usize {
        let mut left = seconds;
        let mut times = [0.0; MOST + 1];
        for (limit, time) in self.history.iter().rev() {
            times[*limit] += time.min(left);
            left -= time;
            if left <= 0.0 {
                break;
            }
        }
        let most = times.iter().copied().fold(0.0, f64::max);
        assert!(most > 0.8 * seconds, "no limit held: {:?}", self.history);
        times.iter().position(|time| *time == most).unwrap()
    }

    fn rate(&self) -> f64 {
        self.delivered / (self.now - self.start).as_secs_f64()
    }
}

#[test]
fn a_host_that_limits_each_connection_gets_as_many_as_pay() {
    // Six connections fill the link of 300 MB/s: eight it is, not sixteen.
    let host = |lanes: usize| Some((50.0 * lanes as f64).min(300.0) * MB);
    let mut sim = Sim::new(&host);
    sim.run(10.0);
    assert_eq!(sim.settled(5.0), 8);
    assert!(sim.rate() > 250.0 * MB, "{}", sim.rate());
    // Without any other limit the bound is ours.
    let host = |lanes: usize| Some(20.0 * lanes as f64 * MB);
    let mut sim = Sim::new(&host);
    sim.run(30.0);
    assert_eq!(sim.settled(10.0), MOST);
}

#[test]
fn a_link_that_four_connections_fill_keeps_four() {
    for rate in [1.0, 20.0, 500.0, 3000.0] {
        let host = move |_: usize| Some(rate * MB);
        let mut sim = Sim::new(&host);
        // Slow links have long parts, so a trial lasts.
        let seconds = (4000.0 / rate).max(60.0);
        sim.run(seconds);
        assert_eq!(sim.settled(seconds / 4.0), FIRST, "{rate} MB/s");
        assert!(sim.rate() > 0.98 * rate * MB);
        // Trials become rare.
        assert!(sim.history.len() < 20, "{rate} MB/s: {:?}", sim.history);
    }
}

#[test]
fn a_server_that_runs_out_of_processor_time_gets_fewer() {
    // Best with two; beyond, each costs the others more than it brings.
    let host = |lanes: usize| {
        Some([0.0, 300.0, 400.0, 340.0, 300.0][lanes.min(4)] * MB / (lanes as f64 / 4.0).max(1.0))
    };
    let mut sim = Sim::new(&host);
    sim.run(60.0);
    assert_eq!(sim.settled(20.0), 2, "{:?}", sim.history);
}

#[test]
fn a_server_that_refuses_more_than_so_many_is_left_in_peace() {
    for allowed in [1, 2, 3, 5, 7] {
        let host = move |lanes: usize| (lanes <= allowed).then_some(30.0 * lanes as f64 * MB);
        let mut sim = Sim::new(&host);
        sim.run(200.0);
        let settled = sim.settled(50.0);
        assert!(
            settled <= allowed && settled * 2 >= allowed,
            "{settled} of {allowed}: {:?}",
            sim.history
        );
        assert!(sim.refusals <= 3, "{allowed}: {} refusals", sim.refusals);
    }
}

#[test]
fn refusals_of_one_moment_halve_once() {
    let mut lanes = Lanes::new(MOST);
    lanes.limit = 16;
    let now = Instant::now();
    for ms in 0..16 {
        lanes.refused(now + Duration::from_millis(ms));
    }
    assert_eq!(lanes.limit(), 8);
    lanes.refused(now + Duration::from_secs(5));
    assert_eq!(lanes.limit(), 4);
    for second in 10..20 {
        lanes.refused(now + Duration::from_secs(5 * second));
    }
    assert_eq!(lanes.limit(), 1, "one lane always stays");
}

#[test]
fn the_user_bounds_the_lanes() {
    for most in [1, 2, 3, 6] {
        let host = |lanes: usize| Some(50.0 * lanes as f64 * MB);
        let mut sim = Sim::new(&host);
        sim.lanes = Lanes::new(most);
        sim.run(20.0);
        assert_eq!(sim.settled(10.0), most);
        assert!(sim.history.iter().all(|(limit, _)| *limit <= most));
    }
    assert_eq!(Lanes::new(0).limit(), 1);
    assert_eq!(Lanes::new(1000).most, MOST);
}

#[test]
fn a_trial_ends_with_the_work() {
    let mut lanes = Lanes::new(MOST);
    let start = Instant::now();
    let mut delivered = 0;
    for part in 0..20 {
        delivered += PART;
        lanes.part(start + Duration::from_millis(100 * part), delivered);
        if lanes.limit() == 8 {
            break;
        }
    }
    assert_eq!(lanes.limit(), 8);
    lanes.idle();
    assert_eq!(lanes.limit(), FIRST);
}

#[test]
fn parts_are_larger_where_requests_cost_much() {
    let ms = Duration::from_millis;
    // A Go registry beside us: 6 ms for the request, 16 ms for its bytes.
    let mut lanes = Lanes::new(MOST);
    assert_eq!(lanes.part_size(), PART);
    lanes.timed(ms(6), ms(16), PART);
    assert_eq!(lanes.part_size(), 2 * PART);
    // The larger parts do not change what is measured, so it stays.
    for _ in 0..50 {
        lanes.timed(ms(6), ms(32), 2 * PART);
    }
    assert_eq!(lanes.part_size(), 2 * PART);
    // A slow link: a lost connection would cost more.
    for _ in 0..50 {
        lanes.timed(ms(30), ms(2000), PART);
    }
    assert_eq!(lanes.part_size(), PART);
    // Between the two thresholds nothing changes, from either side.
    let mut lanes = Lanes::new(MOST);
    for _ in 0..50 {
        lanes.timed(ms(7), ms(100), PART);
    }
    assert_eq!(lanes.part_size(), PART);
    // What readers ask for says nothing about parts.
    for _ in 0..50 {
        lanes.timed(ms(50), ms(1), 64 << 10);
    }
    assert_eq!(lanes.part_size(), PART);
}
