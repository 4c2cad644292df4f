//! Entries in all spellings, and files that are changed.

use super::*;

fn basic(username: &str, password: &str) -> Option<Credentials> {
    Some(Credentials::login(username.into(), Secret::new(password)))
}

fn parse(json: &str) -> AuthFile {
    AuthFile::parse(json.as_bytes(), false).unwrap_or_else(|_| panic!("{json}"))
}

fn lookup(json: &str, host: &str, path: &str) -> Option<Credentials> {
    parse(json).lookup(host, path)
}

#[test]
fn the_most_specific_key_wins() {
    // a:1, b:2, c:3, d:4
    let json = r#"{"auths":{"quay.io":{"auth":"YTox"},"quay.io/org":{"auth":"Yjoy"},"quay.io/org/m":{"auth":"Yzoz"},
        "other.io/org":{"auth":"ZDo0"}}}"#;
    assert_eq!(lookup(json, "quay.io", "x"), basic("a", "1"));
    assert_eq!(lookup(json, "quay.io", "organic/m"), basic("a", "1"));
    assert_eq!(lookup(json, "quay.io", "org/x"), basic("b", "2"));
    assert_eq!(lookup(json, "quay.io", "org/m"), basic("c", "3"));
    assert_eq!(lookup(json, "other.io", "org/x"), basic("d", "4"));
    assert_eq!(lookup(json, "other.io", "x"), None);
    assert_eq!(lookup(json, "io", "x"), None);
}

#[test]
fn legacy_keys_name_their_host() {
    let hub = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"YTox"}}}"#;
    assert_eq!(lookup(hub, "docker.io", "ai/x"), basic("a", "1"));
    assert_eq!(lookup(hub, "index.docker.io.evil.org", "ai/x"), None);
    for key in [
        "https://h:5000",
        "http://h:5000/v2/",
        "https://h:5000/any/path",
        "h:5000/v1/",
        "h:5000/",
        "h:5000",
    ] {
        let json = format!(r#"{{"auths":{{"{key}":{{"auth":"YTox"}}}}}}"#);
        assert_eq!(lookup(&json, "h:5000", "x"), basic("a", "1"), "{key}");
        assert_eq!(lookup(&json, "h", "x"), None, "{key}");
        assert_eq!(lookup(&json, "h:5001", "x"), None, "{key}");
    }
}

#[test]
fn all_kinds_of_entries() {
    for (entry, expected) in [
        (r#"{"username":"u","password":"p:w"}"#, basic("u", "p:w")),
        (
            r#"{"auth":"YTox","identitytoken":"t"}"#,
            Some(Credentials::Identity(Secret::new("t"))),
        ),
        (
            r#"{"registrytoken":"t"}"#,
            Some(Credentials::Registry(Secret::new("t"))),
        ),
        (
            r#"{"username":"<token>","password":"t"}"#,
            Some(Credentials::Identity(Secret::new("t"))),
        ),
        (r#"{"auth":"YTpiOmM="}"#, basic("a", "b:c")),
        (r#"{"auth":"YTpiOmM"}"#, basic("a", "b:c")),
        (r#"{"auth":"!!!"}"#, None),
        (r#"{"auth":""}"#, None),
        (r#"{"auth":7}"#, None),
        ("{}", None),
        ("null", None),
        ("[]", None),
    ] {
        let json = format!(
            r#"{{"auths":{{"h.io":{entry},"i.io":{{"auth":"YTox"}}}},"credsStore":"desktop"}}"#
        );
        assert_eq!(lookup(&json, "h.io", "x"), expected, "{entry}");
        assert_eq!(
            lookup(&json, "i.io", "x"),
            basic("a", "1"),
            "beside {entry}"
        );
    }
    assert_eq!(
        lookup(r#"{"auths":null,"credHelpers":null}"#, "h.io", "x"),
        None
    );
    let legacy = AuthFile::parse(br#"{"https://h.io":{"auth":"YTox"}}"#, true).unwrap();
    assert_eq!(legacy.lookup("h.io", "x"), basic("a", "1"));
}

#[test]
fn which_helper_is_asked() {
    let file = parse(
        r#"{"credsStore":"desktop","credHelpers":{"gcr.io":"gcloud","localhost:5000":"","index.docker.io":"hub"}}"#,
    );
    for (host, helper) in [
        ("gcr.io", Some("gcloud")),
        ("eu.gcr.io", Some("desktop")),
        ("localhost:5000", None),
        ("docker.io", Some("hub")),
    ] {
        assert_eq!(file.helper(host), helper, "{host}");
    }
    assert_eq!(parse("{}").helper("h.io"), None);
    assert_eq!(parse(r#"{"credsStore":""}"#).helper("h.io"), None);
}

#[test]
fn an_edit_changes_one_host_and_nothing_else() {
    let alice = Credentials::login("alice".into(), Secret::new("s3cret"));
    let old = r#"{"zeta":[1,{"a":null}],"auths":{"https://h.io/v1/":{"auth":"YTox"},"h.io/org":{"auth":"Yjoy"},
        "other.io":{"auth":"Yzoz","email":"x@y"}},"credHelpers":{"gcr.io":"gcloud"},"HttpHeaders":{"X":"y"}}"#;
    let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let new = edit(old.as_bytes(), "h.io", Edit::Keep(&alice))
        .unwrap()
        .unwrap();
    let mut expected = read(old);
    let auths = expected["auths"].as_object_mut().unwrap();
    auths.remove("https://h.io/v1/");
    auths.insert(
        "h.io".to_owned(),
        serde_json::json!({"auth": "YWxpY2U6czNjcmV0"}),
    );
    assert_eq!(read(&new), expected);
    assert!(new.starts_with("{\n\t\""), "{new}");
    assert_eq!(lookup(&new, "h.io", "x"), Some(alice.clone()));
    assert!(
        edit(new.as_bytes(), "h.io", Edit::Keep(&alice))
            .unwrap()
            .is_none()
    );

    let gone = edit(new.as_bytes(), "h.io", Edit::Remove).unwrap().unwrap();
    assert_eq!(lookup(&gone, "h.io", "x"), None);
    assert!(
        lookup(&gone, "h.io", "org/x").is_some(),
        "a namespace is its own"
    );
    assert!(
        edit(gone.as_bytes(), "h.io", Edit::Remove)
            .unwrap()
            .is_none()
    );
    assert!(edit(b"", "h.io", Edit::Remove).unwrap().is_none());

    let hub = edit(b"", "docker.io", Edit::Keep(&alice)).unwrap().unwrap();
    assert!(read(&hub)["auths"].get(HUB).is_some(), "{hub}");
    let helped = edit(b"{\"auths\":null}", "h.io", Edit::KeptByHelper)
        .unwrap()
        .unwrap();
    assert_eq!(read(&helped)["auths"]["h.io"], serde_json::json!({}));
    let token = Credentials::login("<token>".into(), Secret::new("r"));
    let token = edit(b"{}", "h.io", Edit::Keep(&token)).unwrap().unwrap();
    assert_eq!(
        lookup(&token, "h.io", "x"),
        Some(Credentials::Identity(Secret::new("r")))
    );

    for broken in ["[]", "{", "\"x\"", r#"{"auths":[]}"#] {
        assert!(
            edit(broken.as_bytes(), "h.io", Edit::Keep(&alice)).is_err(),
            "{broken}"
        );
    }
}

#[tokio::test]
async fn a_mounted_secret_is_found_in_its_directory_and_followed_when_it_is_swapped() {
    let dir = tempfile::tempdir().unwrap();
    // What the kubelet does: a dated directory, `..data` that points at it, and the names as links through it.
    let swap = |version: &str, auth: &str| {
        let dated = dir.path().join(format!("..{version}"));
        std::fs::create_dir(&dated).unwrap();
        std::fs::write(
            dated.join(".dockerconfigjson"),
            format!(r#"{{"auths":{{"h.io":{{"auth":"{auth}"}}}}}}"#),
        )
        .unwrap();
        std::os::unix::fs::symlink(&dated, dir.path().join("..data_tmp")).unwrap();
        std::fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
    };
    swap("1", "YTox");
    std::os::unix::fs::symlink(
        "..data/.dockerconfigjson",
        dir.path().join(".dockerconfigjson"),
    )
    .unwrap();
    for path in [dir.path().to_owned(), dir.path().join(".dockerconfigjson")] {
        let file = AuthFile::read(&path)
            .await
            .unwrap_or_else(|_| panic!("{path:?}"));
        assert_eq!(file.lookup("h.io", "x"), basic("a", "1"));
    }
    swap("2", "Yjoy");
    let file = AuthFile::read(dir.path())
        .await
        .unwrap_or_else(|_| panic!());
    assert_eq!(file.lookup("h.io", "x"), basic("b", "2"));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(
        AuthFile::read(empty.path()).await,
        Err(Unread::Absent)
    ));
}
