//! What was measured: figures by row, and the bar that each row has to reach.

use std::fmt;

/// What must be true of a row's median, and what would be better still.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    limit: Limit,
    aim: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
    Nothing,
    /// Nothing, and yet a figure for the README.
    Shown,
}

impl Bar {
    /// A figure to know, without a promise.
    pub(crate) const NONE: Self = Self {
        limit: Limit::Nothing,
        aim: None,
    };

    /// A figure without a promise that the README shows beside those with one.
    pub(crate) const SHOWN: Self = Self {
        limit: Limit::Shown,
        aim: None,
    };

    pub(crate) const fn at_least(bar: f64) -> Self {
        Self {
            limit: Limit::AtLeast(bar),
            aim: None,
        }
    }

    pub(crate) const fn at_most(bar: f64) -> Self {
        Self {
            limit: Limit::AtMost(bar),
            aim: None,
        }
    }

    /// The same bar with a goal beyond it.
    pub(crate) const fn aim(self, aim: f64) -> Self {
        Self {
            aim: Some(aim),
            ..self
        }
    }

    fn verdict(self, median: f64) -> &'static str {
        // The median counts as it is printed: with two decimals.
        let shown = (median * 100.0).round() / 100.0;
        let reaches = |bar: f64| match self.limit {
            Limit::AtLeast(_) => shown >= bar,
            Limit::AtMost(_) => shown <= bar,
            Limit::Nothing | Limit::Shown => true,
        };
        match self.limit {
            Limit::Nothing | Limit::Shown => "",
            Limit::AtLeast(bar) | Limit::AtMost(bar) if !reaches(bar) => "MISSED",
            _ if self.aim.is_some_and(|aim| !reaches(aim)) => "met, short of the aim",
            _ => "met",
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = match self.limit {
            Limit::AtLeast(bar) => format!("≥ {bar:.2}"),
            Limit::AtMost(bar) => format!("≤ {bar:.2}"),
            Limit::Nothing | Limit::Shown => String::new(),
        };
        if let Some(aim) = self.aim {
            text += &format!(" (aim {aim:.2})");
        }
        f.pad(&text)
    }
}

/// The parts of the table, in the order in which they are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Ratio,
    CoreSecondsPerGb,
    Requests,
    PulledMib,
    AnonymousMib,
    Seconds,
    Milliseconds,
    TokensPerSecond,
}

impl Unit {
    const ALL: [Self; 8] = [
        Self::Ratio,
        Self::CoreSecondsPerGb,
        Self::Requests,
        Self::PulledMib,
        Self::AnonymousMib,
        Self::Seconds,
        Self::Milliseconds,
        Self::TokensPerSecond,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::Ratio => "ratio",
            Self::CoreSecondsPerGb => "core-seconds per GB",
            Self::Requests => "requests",
            Self::PulledMib => "bytes pulled, MiB",
            Self::AnonymousMib => "peak anonymous memory, MiB",
            Self::Seconds => "seconds",
            Self::Milliseconds => "milliseconds",
            Self::TokensPerSecond => "tokens a second",
        }
    }
}

#[derive(Debug)]
struct Row {
    unit: Unit,
    place: &'static str,
    what: String,
    bar: Bar,
    figures: Vec<f64>,
}

impl Row {
    /// Median, lowest and highest.
    fn spread(&self) -> (f64, f64, f64) {
        let figures = self.figures.iter().copied();
        let low = figures.clone().fold(f64::INFINITY, f64::min);
        let high = figures.fold(f64::NEG_INFINITY, f64::max);
        (median(&self.figures), low, high)
    }
}

/// All rows, in the order in which they first got a figure.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
    left_out: Vec<String>,
}

impl Table {
    /// Adds one round's figure to a row without a bar. `place` says where the bytes came from.
    pub(crate) fn add(&mut self, unit: Unit, place: &'static str, what: &str, figure: f64) {
        self.add_with_bar(unit, place, what, Bar::NONE, figure);
    }

    /// Adds one round's ratio.
    pub(crate) fn ratio(&mut self, place: &'static str, what: &str, bar: Bar, figure: f64) {
        self.add_with_bar(Unit::Ratio, place, what, bar, figure);
    }

    /// Adds one round's figure.
    pub(crate) fn add_with_bar(
        &mut self,
        unit: Unit,
        place: &'static str,
        what: &str,
        bar: Bar,
        figure: f64,
    ) {
        let same = |row: &&mut Row| row.unit == unit && row.place == place && row.what == what;
        match self.rows.iter_mut().find(same) {
            Some(row) => row.figures.push(figure),
            None => self.rows.push(Row {
                unit,
                place,
                what: what.to_owned(),
                bar,
                figures: vec![figure],
            }),
        }
    }

    /// Says that something was not measured, and why.
    pub(crate) fn leave_out(&mut self, what: &str, why: &str) {
        let text = format!("{what}: {why}");
        if !self.left_out.contains(&text) {
            eprintln!("left out: {text}");
            self.left_out.push(text);
        }
    }

    /// Prints the rows that have a bar, for the README; `places` heads the column of where bytes came from, or what was run.
    pub(crate) fn print_markdown(&self, places: &str) {
        println!("| | {places} | median (min – max) | bar |\n|---|---|---|---|");
        for unit in Unit::ALL {
            let rows = self.rows.iter().filter(|row| row.unit == unit);
            for row in rows.filter(|row| row.bar.limit != Limit::Nothing) {
                let unit = match unit {
                    Unit::Ratio => String::new(),
                    other => format!(", {}", other.title()),
                };
                let (middle, low, high) = row.spread();
                let missed = match row.bar.verdict(middle) {
                    "MISSED" => " **missed**",
                    _ => "",
                };
                println!(
                    "| {}{unit} | {} | {middle:.2} ({low:.2} – {high:.2}) | {}{missed} |",
                    row.what, row.place, row.bar
                );
            }
        }
        for text in &self.left_out {
            println!("\nLeft out: {text}");
        }
    }

    /// Prints everything, ratios first.
    pub(crate) fn print(&self) {
        for unit in Unit::ALL {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.unit == unit).collect();
            if rows.is_empty() {
                continue;
            }
            let title = unit.title();
            println!("\n{title:<84}{:>8}  {:<18}bar", "median", "(min – max)");
            for row in rows {
                let (middle, low, high) = row.spread();
                let line = format!(
                    "{:<16}{:<68}{middle:>8.2}  {:<18}{:<18}{}",
                    row.place,
                    row.what,
                    format!("({low:.2} – {high:.2})"),
                    row.bar,
                    row.bar.verdict(middle)
                );
                println!("{}", line.trim_end());
            }
        }
        println!();
        for text in &self.left_out {
            println!("LEFT OUT {text}");
        }
        let judged: Vec<&str> = self
            .rows
            .iter()
            .map(|row| row.bar.verdict(median(&row.figures)))
            .filter(|verdict| !verdict.is_empty())
            .collect();
        let met = judged
            .iter()
            .filter(|verdict| **verdict != "MISSED")
            .count();
        println!("{met} of {} bars met", judged.len());
    }
}

/// The one in the middle; of an even number, the mean of the two.
pub(crate) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}
