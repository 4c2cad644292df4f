//! Flags from the table of settings: each command has those of the groups that concern it.

use clap::builder::{PossibleValuesParser, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint};

use crate::config::{ConfigError, Origin, Scope, Setting, Takes, Values, mount_options};

/// What was typed of the settings in the groups `SCOPE` (see [`Scope`]).
#[derive(Clone, Debug, Default)]
pub struct Typed<const SCOPE: u8>(Values);

impl<const SCOPE: u8> Typed<SCOPE> {
    /// What was typed, by setting.
    pub fn values(&self) -> Values {
        self.0.clone()
    }

    /// The same with what `-o` says; flags win over it.
    ///
    /// # Errors
    /// When `-o` has an option that is not known.
    pub(super) fn with_options(&self, options: &[String]) -> Result<Values, ConfigError> {
        let mut values = self.values();
        for option in options.iter().flat_map(|argument| mount_options(argument)) {
            values.option(option)?;
        }
        Ok(values)
    }
}

impl<const SCOPE: u8> Args for Typed<SCOPE> {
    fn augment_args(command: Command) -> Command {
        Scope(SCOPE)
            .settings()
            .fold(command, |command, setting| command.arg(flag(setting)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<const SCOPE: u8> FromArgMatches for Typed<SCOPE> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut values = Values::default();
        for setting in Scope(SCOPE).settings() {
            let given = matches.get_many::<String>(setting.name);
            if let Some(given) = given {
                let origin = Origin::Flag(setting.name.to_owned());
                values.give(setting, given.cloned().collect(), origin);
            }
        }
        Ok(Self(values))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The flag of a setting.
fn flag(setting: &'static Setting) -> Arg {
    let help = format!("{} [default: {}]", setting.about, setting.default);
    let arg = Arg::new(setting.name)
        .long(setting.name)
        .help(help)
        .help_heading(setting.group.heading())
        .hide_short_help(setting.rare)
        .action(match setting.many {
            true => ArgAction::Append,
            false => ArgAction::Set,
        });
    match setting.takes {
        // `--offline`, and `--passthrough=no` for one that is on.
        Takes::Switch => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("yes|no")
            .value_parser(ValueParser::string()),
        Takes::Word(words) => arg
            .value_name(setting.value_name())
            .value_parser(PossibleValuesParser::new(words))
            .hide_possible_values(true),
        Takes::Dir => arg
            .value_name(setting.value_name())
            .value_hint(ValueHint::DirPath),
        Takes::File => arg
            .value_name(setting.value_name())
            .value_hint(ValueHint::FilePath),
        Takes::Text("HOST") => arg
            .value_name(setting.value_name())
            .value_hint(ValueHint::Hostname),
        _ => arg.value_name(setting.value_name()),
    }
}
