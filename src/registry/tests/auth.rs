//! Tokens and logins.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::base::Digest;
use crate::registry::testing::{
    Reply, Request, Server, config, registry, registry_with, reply, soon,
};
use crate::registry::{RegistryConfig, RegistryError};

fn found() -> Reply {
    reply(200, "").header("Docker-Content-Digest", Digest::of(b"x"))
}

/// A registry and its token server in one; every token is good until the next is given.
fn bearer(
    answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static,
) -> (Server, Arc<Mutex<String>>) {
    let valid = Arc::new(Mutex::new(String::new()));
    let given = AtomicUsize::new(0);
    let current = valid.clone();
    let server = Server::start(move |request| {
        if request.target.starts_with("/token") {
            let n = given.fetch_add(1, Ordering::Relaxed) + 1;
            *current.lock().unwrap() = format!("Bearer t{n}");
            return answer(request, n);
        }
        let authorization = request.header("authorization");
        if !authorization.is_empty() && authorization == current.lock().unwrap().as_str() {
            return found();
        }
        let realm = format!("http://{}/token", request.header("host"));
        reply(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#).header(
            "WWW-Authenticate",
            format!(r#"Bearer realm="{realm}",service="a,b \"c\"",scope="repository:org/model:pull,push repository:org/base:pull""#),
        )
    });
    (server, valid)
}

fn token(n: usize, lifetime: &str) -> Reply {
    reply(200, format!(r#"{{"token":"t{n}"{lifetime}}}"#))
}

#[tokio::test]
async fn an_anonymous_token_by_the_challenge() {
    let (server, _) = bearer(|_, n| {
        reply(
            200,
            format!(
                r#"{{"access_token":"t{n}","expires_in":300,"issued_at":"1999-01-01T00:00:00Z"}}"#
            ),
        )
    });
    let registry = registry();
    for _ in 0..3 {
        registry
            .resolve(&server.reference("v1"), soon())
            .await
            .unwrap();
    }
    let seen = server.seen();
    assert_eq!(seen.len(), 5, "401, token, three answers");
    assert_eq!(
        seen[1].target,
        "/token?service=a%2Cb+%22c%22&scope=repository%3Aorg%2Fmodel%3Apull%2Cpush&scope=repository%3Aorg%2Fbase%3Apull"
    );
    assert_eq!(seen[1].header("authorization"), "");
    assert!(
        seen.iter().all(|request| request.target != "/v2/"),
        "no ping"
    );
}

#[tokio::test]
async fn a_login_goes_to_the_token_server_and_the_token_to_the_registry() {
    let (server, _) = bearer(|request, n| match request.header("authorization") {
        "Basic YWxpY2U6czNjcmV0" => token(n, ""),
        _ => reply(401, r#"{"details":"incorrect username or password"}"#),
    });
    let login = format!(r#""{}":{{"auth":"YWxpY2U6czNjcmV0"}}"#, server.address);
    let (registry, dir) = registry_with(&login);
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
    assert!(
        server
            .seen()
            .iter()
            .filter(|request| request.target.starts_with("/v2/"))
            .all(|request| {
                let authorization = request.header("authorization");
                authorization.is_empty() || authorization.starts_with("Bearer ")
            })
    );
    // Another login in the file counts from the next token on.
    let registry = crate::registry::Registry::new(RegistryConfig {
        auth_files: Some(vec![dir.path().join("config.json")]),
        ..config()
    })
    .unwrap();
    std::fs::write(
        dir.path().join("config.json"),
        format!(r#"{{"auths":{{"{}":{{"auth":"YTpi"}}}}}}"#, server.address),
    )
    .unwrap();
    let error = registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::Denied { status: 401, .. }),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("incorrect username")
            && error.to_string().contains("docker login"),
        "{error}"
    );
    std::fs::write(
        dir.path().join("config.json"),
        format!(r#"{{"auths":{{{login}}}}}"#),
    )
    .unwrap();
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn twenty_requests_at_once_fetch_one_token() {
    let (server, valid) = bearer(|_, n| {
        std::thread::sleep(Duration::from_millis(200));
        token(n, r#","expires_in":300"#)
    });
    let registry = registry();
    let together = |round: usize| {
        let requests: Vec<_> = (0..20)
            .map(|_| {
                let (registry, reference) = (registry.clone(), server.reference("v1"));
                tokio::spawn(async move { registry.resolve(&reference, soon()).await })
            })
            .collect();
        let server = &server;
        async move {
            for request in requests {
                request.await.unwrap().unwrap();
            }
            assert_eq!(server.count("/token"), round);
        }
    };
    together(1).await;
    // The registry forgets the token: one of twenty renews it for all.
    *valid.lock().unwrap() = "Bearer other".to_owned();
    together(2).await;
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let (server, _) = bearer(|_, n| token(n, r#","expires_in":1"#));
    let registry = registry();
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(900)).await;
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
    let targets: Vec<String> = server
        .seen()
        .into_iter()
        .map(|request| request.target)
        .collect();
    assert_eq!(targets.len(), 5, "{targets:?}");
    assert!(
        targets[3].starts_with("/token"),
        "the second token comes before the request, not behind a 401: {targets:?}"
    );
}

#[tokio::test]
async fn an_identity_token_is_posted_as_a_refresh_token() {
    let (server, _) = bearer(|request, n| {
        match (
            request.method.as_str(),
            std::str::from_utf8(&request.body).unwrap(),
        ) {
            ("POST", body)
                if body.starts_with(
                    "grant_type=refresh_token&client_id=ocifs&service=a%2Cb+%22c%22&scope=",
                ) && body.ends_with("&refresh_token=r%26t") =>
            {
                token(n, "")
            }
            other => reply(400, format!("{other:?}")),
        }
    });
    let (registry, _dir) = registry_with(&format!(
        r#""{}/org":{{"identitytoken":"r&t"}}"#,
        server.address
    ));
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
    assert_eq!(server.count("r%26t"), 0, "never in a URL");
}

#[tokio::test]
async fn a_refresh_token_that_was_replaced_is_not_sent_again() {
    let (server, valid) = bearer(|request, n| {
        let body = std::str::from_utf8(&request.body).unwrap();
        let sent = body.rsplit('=').next().unwrap();
        match (n, sent) {
            (1, "first") => reply(200, r#"{"access_token":"t1","refresh_token":"second"}"#),
            (2, "second") => reply(200, r#"{"access_token":"t2"}"#),
            // It has forgotten the second, and somebody has written a new one into the file.
            (3, "second") | (4, "first") => reply(400, r#"{"error":"invalid_grant"}"#),
            (5, "third") => reply(200, r#"{"access_token":"t5"}"#),
            other => reply(500, format!("{other:?}")),
        }
    });
    let entry = |token: &str| format!(r#""{}":{{"identitytoken":"{token}"}}"#, server.address);
    let (registry, dir) = registry_with(&entry("first"));
    let reference = server.reference("v1");
    for n in 1..=2 {
        registry.resolve(&reference, soon()).await.unwrap();
        assert_eq!(server.count("/token"), n);
        *valid.lock().unwrap() = "forgotten".to_owned();
    }
    for n in 3..=4 {
        let error = registry.resolve(&reference, soon()).await.unwrap_err();
        assert!(
            matches!(error, RegistryError::Denied { .. }),
            "{n}: {error:?}"
        );
        assert!(error.to_string().contains("identity token"), "{error}");
    }
    let file = dir.path().join("config.json");
    std::fs::write(file, format!(r#"{{"auths":{{{}}}}}"#, entry("third"))).unwrap();
    registry.resolve(&reference, soon()).await.unwrap();
}

#[tokio::test]
async fn a_token_server_that_knows_no_get_is_posted_the_password() {
    let (server, _) = bearer(|request, n| {
        let body = std::str::from_utf8(&request.body).unwrap();
        match request.method.as_str() {
            "GET" => reply(405, ""),
            _ if body.starts_with(
                "grant_type=password&client_id=ocifs&service=a%2Cb+%22c%22&scope=repository",
            ) && body.ends_with("&username=alice&password=s3cret") =>
            {
                token(n, "")
            }
            _ => reply(401, r#"{"error":"invalid_grant"}"#),
        }
    });
    let with = |auth: &str| registry_with(&format!(r#""{}":{{"auth":"{auth}"}}"#, server.address));
    let (registry, _dir) = with("YWxpY2U6czNjcmV0");
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
    assert!(
        server
            .seen()
            .iter()
            .all(|request| !request.target.contains("s3cret")),
        "never in a URL"
    );
    let (wrong, _dir) = with("YTpi");
    let error = wrong
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("405"),
        "what the first way was answered: {error}"
    );
}

#[tokio::test]
async fn a_403_is_met_with_the_password_that_was_written_since() {
    let expired = "Basic YWxpY2U6b2xk"; // alice:old
    let server = Server::start(move |request| match request.header("authorization") {
        "" => reply(401, "").header("WWW-Authenticate", "Basic realm=x"),
        "Basic YWxpY2U6czNjcmV0" => found(),
        authorization if authorization == expired => reply(
            403,
            r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}"#,
        )
        .header("Docker-Distribution-Api-Version", "registry/2.0"),
        other => reply(500, other),
    });
    let entry = |auth: &str| {
        format!(
            r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#,
            server.address
        )
    };
    let (registry, dir) = registry_with(&format!(
        r#""{}":{{"auth":"YWxpY2U6b2xk"}}"#,
        server.address
    ));
    let digest = Digest::of(b"x");
    let repository = server.repository();
    let get = || registry.manifest(&repository, &digest, soon());
    let error = get().await.unwrap_err();
    assert!(error.to_string().contains("has expired"), "{error}");
    let asked = server.seen().len();
    get().await.unwrap_err();
    assert_eq!(
        server.seen().len(),
        asked + 1,
        "the same password is not tried twice"
    );
    std::fs::write(dir.path().join("config.json"), entry("YWxpY2U6czNjcmV0")).unwrap();
    registry
        .resolve(&server.reference("v1"), soon())
        .await
        .unwrap();
}

#[tokio::test]
async fn basic_where_only_the_root_has_a_challenge() {
    let server =
        Server::start(
            |request| match (request.target.as_str(), request.header("authorization")) {
                (_, "Basic YTpi") => found(),
                ("/v2/", _) => reply(401, "")
                    .header("WWW-Authenticate", "Negotiate")
                    .header("WWW-Authenticate", "Basic realm=\"r\""),
                _ => reply(401, ""),
            },
        );
    let (registry, _dir) = registry_with(&format!(r#""{}":{{"auth":"YTpi"}}"#, server.address));
    for _ in 0..3 {
        registry
            .resolve(&server.reference("v1"), soon())
            .await
            .unwrap();
    }
    assert_eq!(
        (server.count("/manifests/"), server.seen().len()),
        (4, 5),
        "one 401, one look at /v2/"
    );
}

#[tokio::test]
async fn refusals_are_final_and_say_what_to_try() {
    let (refusing, _) = bearer(|_, _| reply(200, r#"{"token":"not-good"}"#));
    let error = registry()
        .resolve(&refusing.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(
        matches!(error, RegistryError::Denied { status: 401, .. }) && !error.is_transient(),
        "{error:?}"
    );
    assert!(error.to_string().contains("podman login"), "{error}");
    assert_eq!(refusing.seen().len(), 3, "401, token, 401");

    let basic = Server::start(|_| reply(401, "").header("WWW-Authenticate", "Basic realm=x"));
    let error = registry()
        .resolve(&basic.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no credential file"), "{error}");
    assert_eq!(basic.seen().len(), 1);

    let (wrong, _dir) = registry_with(&format!(r#""{}":{{"auth":"YTpi"}}"#, basic.address));
    let error = wrong.resolve(&basic.reference("v1"), soon()).await;
    let said = error.unwrap_err().to_string();
    assert!(
        said.contains("does not accept the password") && said.contains("`a`"),
        "{said}"
    );
    assert!(!said.contains("may not exist"), "{said}");
}

#[tokio::test]
async fn token_servers_that_misbehave() {
    type Answer = fn() -> Reply;
    let answers: [(Answer, &str); 6] = [
        (|| reply(200, "{}"), "has no token"),
        (|| reply(200, "<html>"), "not the JSON"),
        (
            || reply(200, r#"{"token":"a\r\nX: y"}"#),
            "cannot be in a header",
        ),
        (|| reply(200, "{").then_endless(), "longer than"),
        (
            || {
                reply(
                    403,
                    r#"{"errors":[{"code":"DENIED","message":"requested access is denied"}]}"#,
                )
            },
            "requested access is denied",
        ),
        (|| reply(404, ""), "gives no token"),
    ];
    for (answer, said) in answers {
        let (server, _) = bearer(move |_, _| answer());
        let error = registry()
            .resolve(&server.reference("v1"), soon())
            .await
            .unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(server.count("/token"), 1, "{said}");
    }
    let (busy, _) = bearer(|_, n| if n == 1 { reply(503, "") } else { token(n, "") });
    registry()
        .resolve(&busy.reference("v1"), soon())
        .await
        .unwrap();
    let far = Server::start(|_| {
        reply(401, "").header(
            "WWW-Authenticate",
            r#"Bearer realm="http://192.0.2.1/token""#,
        )
    });
    let error = registry()
        .resolve(&far.reference("v1"), soon())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("plain HTTP"), "{error}");
}
