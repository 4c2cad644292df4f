//! The command line.

/// What was asked for after `--`.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Small files and one round: does everything work, and roughly where are we?
    pub(crate) quick: bool,
    /// Times that each contestant has its turn.
    pub(crate) rounds: usize,
    /// Print what the README shows.
    pub(crate) markdown: bool,
    groups: Vec<String>,
}

const USAGE: &str =
    "usage: cargo bench --bench read_path -- [--quick] [--rounds N] [--markdown] [[--only] GROUP]…";

impl Options {
    /// Reads the arguments; `known` are the groups with what each is about.
    ///
    /// # Errors
    /// The text for people, when it is not understood or help is wanted.
    pub(crate) fn parse(
        arguments: impl Iterator<Item = String>,
        known: &[(&str, &str)],
    ) -> Result<Self, String> {
        let help = || {
            let groups = known
                .iter()
                .map(|(name, about)| format!("  {name:<10}{about}\n"));
            format!(
                "{USAGE}\n\nGroups (default: all):\n{}",
                groups.collect::<String>()
            )
        };
        let (mut quick, mut markdown) = (false, false);
        let (mut rounds, mut groups) = (None, Vec::new());
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                // What cargo adds, and a flag that says what a group's name says alone.
                "--bench" | "--only" => {}
                "--quick" => quick = true,
                "--markdown" => markdown = true,
                "--rounds" => {
                    let count = arguments.next().and_then(|text| text.parse().ok());
                    rounds = Some(count.filter(|count| *count > 0).ok_or_else(help)?);
                }
                name if known.iter().any(|(group, _)| *group == name) => groups.push(argument),
                _ => return Err(help()),
            }
        }
        Ok(Self {
            quick,
            rounds: rounds.unwrap_or(if quick { 1 } else { 5 }),
            markdown,
            groups,
        })
    }

    /// Whether a group is to run.
    pub(crate) fn wants(&self, group: &str) -> bool {
        self.groups.is_empty() || self.groups.iter().any(|wanted| wanted == group)
    }

    /// `full`, or `quick` where a small run is wanted.
    pub(crate) fn scaled<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}
