//! Which value wins, what it becomes, and how a wrong one is reported.

use std::collections::HashMap;

use super::*;
use crate::blob::Prefetch;

struct Case {
    dir: tempfile::TempDir,
    variables: HashMap<String, String>,
    user: u32,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home").display().to_string();
        Self {
            dir,
            variables: HashMap::from([("HOME".to_owned(), home)]),
            user: 1000,
        }
    }

    fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    fn file(self, place: &str, text: &str) -> Self {
        let path = self.dir.path().join(place);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }

    fn resolve(&self, options: &[&str]) -> Result<Settings, ConfigError> {
        let mut values = Values::default();
        for option in options {
            values.option(option)?;
        }
        let surroundings = Surroundings {
            variable: &|name| self.variables.get(name).map(OsString::from),
            user: self.user,
            directory: PathBuf::from("/here"),
            system_file: self.dir.path().join("etc"),
        };
        Settings::resolve(values, None, &surroundings)
    }

    fn fails(&self, options: &[&str]) -> String {
        self.resolve(options).unwrap_err().to_string()
    }
}

const USER: &str = "home/.config/ocifs/config.toml";

#[test]
fn flag_then_variable_then_user_then_system_then_default() {
    let ttl =
        |case: &Case, options: &[&str]| case.resolve(options).unwrap().model.tag_ttl.as_secs();
    let case = Case::new();
    assert_eq!(ttl(&case, &[]), 900);
    let case = case.file("etc", "tag-ttl = '1s'\nprefetch = 'none'");
    assert_eq!(ttl(&case, &[]), 1);
    let case = case.file(USER, "tag_ttl = \"2s\"");
    assert_eq!(ttl(&case, &[]), 2);
    let case = case.variable("OCIFS_TAG_TTL", "3s");
    assert_eq!(ttl(&case, &[]), 3);
    assert_eq!(ttl(&case, &["tag-ttl=4s"]), 4);
    assert_eq!(
        case.resolve(&[]).unwrap().blob.prefetch,
        Prefetch::None,
        "files are joined key by key"
    );
}

#[test]
fn the_cache_is_in_its_customary_place() {
    let dir = |case: &Case| case.resolve(&[]).unwrap().cache_dir;
    let case = Case::new();
    assert_eq!(dir(&case), case.dir.path().join("home/.cache/ocifs"));
    assert_eq!(
        dir(&case.variable("XDG_CACHE_HOME", "/x")),
        Path::new("/x/ocifs")
    );
    assert_eq!(
        dir(&Case {
            user: 0,
            ..Case::new()
        }),
        Path::new("/var/cache/ocifs")
    );
    assert_eq!(
        dir(&Case::new().variable("OCIFS_CACHE_DIR", "rel")),
        Path::new("/here/rel")
    );
    let runtime = |case: &Case| case.resolve(&[]).unwrap().runtime_dir;
    assert_eq!(runtime(&Case::new()), Path::new("/tmp/ocifs-1000"));
    assert_eq!(
        runtime(&Case::new().variable("XDG_RUNTIME_DIR", "/run/user/1000")),
        Path::new("/run/user/1000/ocifs")
    );
    assert_eq!(
        runtime(&Case {
            user: 0,
            ..Case::new()
        }),
        Path::new("/run/ocifs")
    );
    let mut homeless = Case::new();
    homeless.variables.clear();
    assert!(matches!(homeless.resolve(&[]), Err(ConfigError::NoHome)));
}

#[test]
fn values_of_all_shapes_arrive() {
    let text = "offline = true\nplain-http = ['a:5000', 'b']\ncache-size = '2GiB'\nca-file = ['/ca.pem', 'own.pem']";
    let settings = Case::new()
        .file(USER, text)
        .resolve(&["allow_other"])
        .unwrap();
    assert!(settings.blob.offline && settings.allow_other);
    assert_eq!(settings.registry.plain_http, ["a:5000", "b"]);
    assert_eq!(
        settings.registry.ca_files,
        [Path::new("/ca.pem"), Path::new("/here/own.pem")]
    );
    assert_eq!(settings.cache_size, Some(2 << 30));
    let own = settings.registry.auth_files.unwrap();
    assert!(
        own.iter()
            .any(|path| path.ends_with("home/.docker/config.json")),
        "{own:?}"
    );
    let case = Case::new()
        .variable("OCIFS_PLAIN_HTTP", "a:5000:b:c:80")
        .variable("OCIFS_OFFLINE", "no");
    let settings = case.resolve(&["auth-file=/a:/b"]).unwrap();
    assert_eq!(settings.registry.plain_http, ["a:5000", "b", "c:80"]);
    assert_eq!(
        settings.registry.auth_files.unwrap(),
        [Path::new("/a"), Path::new("/b")]
    );
}

#[test]
fn owner_and_mask_are_shown_as_they_are_given() {
    let settings = Case::new().resolve(&["uid=1001", "gid=0", "umask=0027"]);
    let settings = settings.unwrap();
    assert_eq!(
        (settings.uid, settings.gid, settings.umask),
        (Some(1001), Some(0), 0o27)
    );
    let settings = Case::new().resolve(&[]).unwrap();
    assert_eq!(
        (settings.uid, settings.gid, settings.umask),
        (None, None, 0)
    );
}

#[test]
fn a_directory_of_mirrors_that_was_typed_must_exist() {
    let typed = |dir: &str| {
        let mut values = Values::default();
        let setting = Setting::named("hosts-dir").unwrap();
        values.give(
            setting,
            vec![dir.to_owned()],
            Origin::Flag("hosts-dir".into()),
        );
        let surroundings = Surroundings {
            variable: &|name| (name == "HOME").then(|| "/home/x".into()),
            user: 1000,
            directory: "/".into(),
            system_file: "/nonexistent".into(),
        };
        Settings::resolve(values, None, &surroundings)
    };
    let error = typed("/nowhere/certs.d").unwrap_err().to_string();
    assert!(
        error.contains("--hosts-dir") && error.contains("/nowhere/certs.d"),
        "{error}"
    );
    let settings = typed("tmp").unwrap();
    assert_eq!(
        settings.registry.hosts_dir.as_deref(),
        Some(Path::new("/tmp"))
    );
    // In a file of many machines it may name what some of them lack.
    let settings = Case::new()
        .resolve(&["hosts-dir=/nowhere/certs.d"])
        .unwrap();
    assert!(settings.registry.hosts_dir.is_some());
}

#[test]
fn a_login_goes_where_docker_and_podman_look() {
    let written = |case: Case, options: &[&str]| case.resolve(options).unwrap().login_file.unwrap();
    let home = written(Case::new(), &[]);
    assert!(home.ends_with(".docker/config.json"), "{home:?}");
    let docker = || Case::new().variable("DOCKER_CONFIG", "/docker");
    assert_eq!(written(docker(), &[]), Path::new("/docker/config.json"));
    let podman = || docker().variable("REGISTRY_AUTH_FILE", "/podman.json");
    assert_eq!(written(podman(), &[]), Path::new("/podman.json"));
    assert_eq!(
        written(podman(), &["auth-file=/own.json:/other.json"]),
        Path::new("/own.json")
    );
}

#[test]
fn a_url_is_no_host_and_a_named_credential_file_must_exist() {
    let url = Case::new()
        .resolve(&["plain-http=http://r.lan"])
        .unwrap_err();
    let url = url.to_string();
    assert!(
        url.contains("plain-http") && url.contains("HOST:PORT"),
        "{url}"
    );
    let mut values = Values::default();
    let setting = Setting::named("auth-file").unwrap();
    let given = vec!["/nowhere/auth.json".to_owned()];
    values.give(setting, given, Origin::Flag("auth-file".into()));
    let case = Case::new();
    let surroundings = Surroundings {
        variable: &|name| case.variables.get(name).map(Into::into),
        user: 0,
        directory: "/".into(),
        system_file: "/nowhere/config.toml".into(),
    };
    let error = Settings::resolve(values, None, &surroundings).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("--auth-file") && error.contains("/nowhere/auth.json"),
        "{error}"
    );
}

#[test]
fn a_mistake_is_reported_with_its_place_and_the_nearest_name() {
    let typo = Case::new()
        .file(USER, "# mine\ncache-sise = '1G'\n")
        .fails(&[]);
    assert!(
        typo.contains("config.toml:2:") && typo.contains("did you mean `cache-size`?"),
        "{typo}"
    );
    let syntax = Case::new()
        .file(USER, "offline = true\ncache-size = = 3")
        .fails(&[]);
    assert!(syntax.contains("config.toml:2:"), "{syntax}");
    let table = Case::new().file(USER, "[cache]\ndir = '/x'").fails(&[]);
    assert!(table.contains("no setting `cache`"), "{table}");
    let variable = Case::new()
        .variable("OCIFS_CACHE_SIZE", "1 parsec")
        .fails(&[]);
    assert!(
        variable.starts_with("OCIFS_CACHE_SIZE: ") && variable.contains("512MiB"),
        "{variable}"
    );
    let case = Case::new();
    for (option, part) in [
        ("prefetchh=none", "did you mean `prefetch`?"),
        ("_netdve", "did you mean `_netdev`?"),
        ("cache-size", "needs a value"),
        ("cache-size=1k", "at least 64.0 MiB"),
        ("memory=1M", "at least 16.0 MiB"),
        ("prefetch=all", "not one of none, blob, model"),
        ("read-timeout=0", "longer than 0"),
        ("tag-ttl=15", "90s"),
        ("verify=never", "not one of early, strict"),
        ("offline=maybe", "neither true nor false"),
        ("uid=alice", "`id NAME` tells it"),
        ("gid=4294967295", "not the number of a user"),
        ("umask=29", "in octal"),
        ("umask=+27", "in octal"),
        ("umask=1777", "in octal"),
        ("plain-http=", ""),
    ] {
        match case.resolve(&[option]) {
            Err(error) => assert!(error.to_string().contains(part), "{option}: {error}"),
            Ok(_) => assert!(part.is_empty(), "{option}"),
        }
    }
}

#[test]
fn a_named_file_is_the_only_one_and_must_exist() {
    let case = Case::new()
        .file(USER, "offline = true")
        .file("own.toml", "prefetch = 'blob'");
    let surroundings = Surroundings {
        variable: &|name| case.variables.get(name).map(OsString::from),
        user: 1000,
        directory: PathBuf::from("/here"),
        system_file: case.dir.path().join("etc"),
    };
    let resolve = |path: &str| {
        Settings::resolve(
            Values::default(),
            Some(&case.dir.path().join(path)),
            &surroundings,
        )
    };
    let settings = resolve("own.toml").unwrap();
    assert_eq!(
        (settings.blob.offline, settings.blob.prefetch),
        (false, Prefetch::Blob)
    );
    assert!(matches!(
        resolve("none.toml"),
        Err(ConfigError::Read { .. })
    ));
}

#[test]
fn durations_read_as_people_write_them() {
    for (text, millis) in [
        ("0", 0),
        ("500ms", 500),
        ("90s", 90_000),
        ("15m", 900_000),
        ("1h30m", 5_400_000),
        ("2d", 172_800_000),
    ] {
        assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
    }
    for text in [
        "",
        "15",
        "m",
        "-1s",
        "1.5h",
        "1 h",
        "99999999999999999999s",
        "400d",
        "1y",
    ] {
        assert!(duration(text).is_err(), "{text}");
    }
}

#[test]
fn what_is_for_mount_8_alone_is_dropped() {
    let left: Vec<&str> = mount_options(
        "rw,_netdev,nofail,x-systemd.automount,comment=a b,cache-size=20G,,noatime,offline",
    )
    .collect();
    assert_eq!(left, ["cache-size=20G", "offline"]);
}
