//! What follows a daemon that has ended: a decision about what is known of its end, and nothing else.

use std::time::Duration;

/// How many deaths are too many in how long a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tries {
    /// So many.
    pub deaths: usize,
    /// In this time.
    pub within: Duration,
}

impl Default for Tries {
    fn default() -> Self {
        Self {
            deaths: 5,
            within: Duration::from_secs(30),
        }
    }
}

/// How a daemon ended, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    /// It was up, and what a next one needs is here.
    pub(super) was_held: bool,
    /// It said that another one should follow.
    pub(super) restart: bool,
    /// It was up and ended with code 0.
    pub(super) well: bool,
    /// The mount is still there.
    pub(super) mounted: bool,
    /// The mount is to end.
    pub(super) told_to_end: bool,
    /// How many have died in the time that counts, this one included.
    pub(super) deaths: usize,
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Start another one.
    Start,
    /// That was it.
    End,
    /// Take the mount down and end.
    TakeDown,
    /// Close the connection, and end.
    GiveUp,
}

pub(super) fn next(ending: Ending, tries: Tries) -> Next {
    match ending {
        Ending {
            was_held: false, ..
        }
        | Ending { mounted: false, .. } => Next::End,
        Ending {
            told_to_end: true, ..
        } => Next::TakeDown,
        Ending { restart: true, .. } => Next::Start,
        Ending { well: true, .. } => Next::End,
        _ if ending.deaths >= tries.deaths => Next::GiveUp,
        _ => Next::Start,
    }
}

/// How long to wait before the next daemon is started, after so many deaths: the first ones are followed at once.
pub(super) fn pause(deaths: usize) -> Duration {
    const FIRST: Duration = Duration::from_millis(50);
    match u32::try_from(deaths.saturating_sub(2)) {
        Ok(0) | Err(_) => Duration::ZERO,
        Ok(more) => FIRST * 2_u32.pow(more.min(5)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIED: Ending = Ending {
        was_held: true,
        restart: false,
        well: false,
        mounted: true,
        told_to_end: false,
        deaths: 1,
    };

    #[test]
    fn what_follows_a_daemon() {
        let tries = Tries::default();
        let decide = |ending| next(ending, tries);
        assert_eq!(decide(DIED), Next::Start);
        assert_eq!(decide(Ending { deaths: 4, ..DIED }), Next::Start);
        assert_eq!(decide(Ending { deaths: 5, ..DIED }), Next::GiveUp);
        let never_up = Ending {
            was_held: false,
            ..DIED
        };
        assert_eq!(decide(never_up), Next::End);
        let well = Ending { well: true, ..DIED };
        assert_eq!(decide(well), Next::End);
        let restart = Ending {
            restart: true,
            deaths: 9,
            ..DIED
        };
        assert_eq!(decide(restart), Next::Start);
        let told = Ending {
            told_to_end: true,
            ..DIED
        };
        assert_eq!(decide(told), Next::TakeDown);
        let unmounted = Ending {
            mounted: false,
            ..told
        };
        assert_eq!(decide(unmounted), Next::End);
    }

    #[test]
    fn the_first_deaths_are_followed_at_once() {
        assert_eq!((pause(1), pause(2)), (Duration::ZERO, Duration::ZERO));
        assert!(pause(3) > Duration::ZERO && pause(4) > pause(3));
        assert!(pause(usize::MAX) < Duration::from_secs(3));
    }
}
