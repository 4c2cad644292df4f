//! From flags to settings: which flag gives which, and that `-o` comes after flags.

use super::args::{CacheArgs, Mount, ReachArgs, Reading, RegistryArgs};
use crate::config::{ConfigError, Origin, Setting, Values, mount_options};

impl CacheArgs {
    fn give(&self, values: &mut Values) {
        one(values, "cache-dir", &self.cache_dir);
        one(values, "cache-size", &self.cache_size);
    }

    /// What was typed, by setting.
    pub fn values(&self) -> Values {
        let mut values = Values::default();
        self.give(&mut values);
        values
    }
}

impl ReachArgs {
    fn give(&self, values: &mut Values) {
        many(values, "plain-http", &self.plain_http);
        many(values, "ca-file", &self.ca_file);
        one(values, "hosts-dir", &self.hosts_dir);
    }

    /// What was typed, by setting.
    pub fn values(&self) -> Values {
        let mut values = Values::default();
        self.give(&mut values);
        values
    }
}

impl RegistryArgs {
    fn give(&self, values: &mut Values) {
        self.reach.give(values);
        many(values, "auth-file", &self.auth_file);
    }

    /// What was typed, by setting.
    pub fn values(&self) -> Values {
        let mut values = Values::default();
        self.give(&mut values);
        values
    }
}

impl Reading {
    /// What was typed, by setting.
    pub fn values(&self) -> Values {
        let mut values = self.cache.values();
        self.registry.give(&mut values);
        switch(&mut values, "offline", self.offline);
        one(&mut values, "read-timeout", &self.read_timeout);
        one(&mut values, "platform", &self.platform);
        values
    }
}

impl Mount {
    /// What was typed, by setting: flags first, then `-o`.
    ///
    /// # Errors
    /// When `-o` has an option that is not known.
    pub fn values(&self) -> Result<Values, ConfigError> {
        let mut values = self.reading.values();
        one(&mut values, "memory", &self.memory);
        one(&mut values, "prefetch", &self.prefetch);
        one(&mut values, "tag-ttl", &self.tag_ttl);
        one(&mut values, "verify", &self.verify);
        switch(&mut values, "allow-other", self.allow_other);
        for option in self
            .options
            .iter()
            .flat_map(|argument| mount_options(argument))
        {
            values.option(option)?;
        }
        Ok(values)
    }
}

fn give(values: &mut Values, name: &str, list: Vec<String>) {
    let setting = Setting::named(name).expect("every flag here has a row in SETTINGS");
    values.give(setting, list, Origin::Flag(name.to_owned()));
}

fn one(values: &mut Values, name: &str, value: &Option<String>) {
    if let Some(value) = value {
        give(values, name, vec![value.clone()]);
    }
}

fn many(values: &mut Values, name: &str, list: &[String]) {
    if !list.is_empty() {
        give(values, name, list.to_vec());
    }
}

fn switch(values: &mut Values, name: &str, on: bool) {
    if on {
        give(values, name, vec!["true".to_owned()]);
    }
}
