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

impl Options {
    /// Reads the arguments of the benchmark `name`; `known` are the groups with what each is about.
    ///
    /// # Errors
    /// The text for people, when it is not understood or help is wanted.
    pub(crate) fn parse(
        name: &str,
        arguments: impl Iterator<Item = String>,
        known: &[(&str, &str)],
    ) -> Result<Self, String> {
        let help = || {
            let groups = known
                .iter()
                .map(|(name, about)| format!("  {name:<10}{about}\n"));
            format!(
                "usage: cargo bench --bench {name} -- [--quick] [--rounds N] [--markdown] [[--only] GROUP]…\n\nGroups (default: all):\n{}",
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

    /// The rounds of a group, told on stderr as they begin.
    pub(crate) fn turns(&self, group: &'static str) -> impl Iterator<Item = usize> + use<> {
        let rounds = self.rounds;
        (1..=rounds).inspect(move |round| eprintln!("{group}: round {round} of {rounds}"))
    }

    /// `full`, or `quick` where a small run is wanted.
    pub(crate) fn scaled<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}
