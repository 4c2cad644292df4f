//! Parses `WWW-Authenticate` (RFC 9110, section 11.6.1) as registries use it.

/// How a registry wants requests authorised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// `Basic`: user name and password with each request (RFC 7617).
    Basic,
    /// `Bearer`: a token from a token server (distribution's "Token Authentication Specification").
    Bearer {
        /// Address of the token server.
        realm: String,
        /// The name under which it knows the registry.
        service: Option<String>,
        /// The scopes that the refused request needs.
        scopes: Vec<String>,
    },
}

/// Longest header that is looked at, in bytes; what is behind is ignored.
const LONGEST: usize = 16 << 10;
/// Most challenges and most parameters that are looked at.
const MOST: usize = 64;

/// The challenge to follow among those in one or several headers: Bearer before Basic, others are skipped.
pub(super) fn choose<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = None;
    for header in headers.into_iter().take(MOST) {
        for raw in parse(header) {
            if raw.scheme.eq_ignore_ascii_case("bearer") {
                // Without a realm there is nobody to ask; perhaps another challenge helps.
                if let Some(realm) = raw.get("realm").filter(|realm| !realm.is_empty()) {
                    let scopes = raw.get("scope").unwrap_or_default();
                    return Some(Challenge::Bearer {
                        realm: realm.to_owned(),
                        service: raw
                            .get("service")
                            .filter(|service| !service.is_empty())
                            .map(str::to_owned),
                        scopes: scopes
                            .split(' ')
                            .filter(|scope| !scope.is_empty())
                            .take(MOST)
                            .map(str::to_owned)
                            .collect(),
                    });
                }
            } else if raw.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

#[derive(Debug, PartialEq, Eq)]
struct Raw {
    scheme: String,
    parameters: Vec<(String, String)>,
}

impl Raw {
    fn get(&self, name: &str) -> Option<&str> {
        self.parameters
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// All challenges in one header, in order. Malformed parts end the parse; what was understood before stays.
fn parse(header: &str) -> Vec<Raw> {
    let mut text = Cursor(&header.as_bytes()[..header.len().min(LONGEST)]);
    let mut challenges: Vec<Raw> = Vec::new();
    while challenges.len() < MOST {
        text.skip(b" \t,");
        let name = text.token();
        if name.is_empty() {
            break;
        }
        // `name = value` goes on with the challenge before; `name` alone or before a space begins one.
        let mut ahead = text;
        ahead.skip(b" \t");
        if ahead.eat(b'=') {
            ahead.skip(b" \t");
            let Some(value) = ahead.value() else { break };
            text = ahead;
            if let Some(challenge) = challenges.last_mut()
                && challenge.parameters.len() < MOST
            {
                challenge.parameters.push((name, value));
            }
            continue;
        }
        challenges.push(Raw {
            scheme: name,
            parameters: Vec::new(),
        });
        text.skip(b" \t");
        text.skip_token68();
    }
    challenges
}

#[derive(Clone, Copy)]
struct Cursor<'a>(&'a [u8]);

fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

impl Cursor<'_> {
    fn skip(&mut self, bytes: &[u8]) {
        let n = self.0.iter().take_while(|b| bytes.contains(b)).count();
        self.0 = &self.0[n..];
    }

    fn eat(&mut self, byte: u8) -> bool {
        let there = self.0.first() == Some(&byte);
        if there {
            self.0 = &self.0[1..];
        }
        there
    }

    fn token(&mut self) -> String {
        let n = self.0.iter().take_while(|&&b| is_token(b)).count();
        let (token, rest) = self.0.split_at(n);
        self.0 = rest;
        String::from_utf8_lossy(token).into_owned()
    }

    /// A token or a quoted string with its escapes undone; `None` when the quote does not close.
    fn value(&mut self) -> Option<String> {
        if !self.eat(b'"') {
            // Some servers leave values with '/', ':' or '=' unquoted: take all up to a comma or blank.
            let n = self.0.iter().take_while(|b| !b" \t,\"".contains(b)).count();
            let (value, rest) = self.0.split_at(n);
            self.0 = rest;
            return Some(String::from_utf8_lossy(value).into_owned());
        }
        let mut value = Vec::new();
        loop {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            match byte {
                b'"' => return Some(String::from_utf8_lossy(&value).into_owned()),
                b'\\' => {
                    let (&escaped, rest) = self.0.split_first()?;
                    self.0 = rest;
                    value.push(escaped);
                }
                byte => value.push(byte),
            }
        }
    }

    /// Skips `Negotiate YII…==`: a token68 stands alone up to a comma or the end.
    fn skip_token68(&mut self) {
        let n = self
            .0
            .iter()
            .take_while(|&&b| is_token(b) || b == b'/')
            .count();
        let padding = self.0[n..].iter().take_while(|&&b| b == b'=').count();
        let mut behind = Cursor(&self.0[n + padding..]);
        behind.skip(b" \t");
        if n > 0 && (behind.0.is_empty() || behind.0.starts_with(b",")) {
            self.0 = behind.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scopes: &[&str]) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
        })
    }

    #[test]
    fn challenges_of_registries() {
        for (headers, expected) in [
            (
                vec![
                    r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:ai/x:pull,push""#,
                ],
                bearer(
                    "https://auth.docker.io/token",
                    Some("registry.docker.io"),
                    &["repository:ai/x:pull,push"],
                ),
            ),
            (
                vec![r#"Basic realm="Registry Realm""#],
                Some(Challenge::Basic),
            ),
            (vec!["Basic"], Some(Challenge::Basic)),
            (
                vec![r#"bEaReR REALM = "https://h/t" , Service=svc"#],
                bearer("https://h/t", Some("svc"), &[]),
            ),
            (
                vec!["Bearer realm=https://h/t?a=b,service=x"],
                bearer("https://h/t?a=b", Some("x"), &[]),
            ),
            (
                vec![r#"Bearer realm="https://h/t",scope="a:b:pull c:d:pull""#],
                bearer("https://h/t", None, &["a:b:pull", "c:d:pull"]),
            ),
            (
                vec![r#"Bearer realm="https://h/\"q\\\",t",service="s""#],
                bearer("https://h/\"q\\\",t", Some("s"), &[]),
            ),
            (
                vec![r#"Basic realm="x, Bearer realm=y", Bearer realm="https://h/t""#],
                bearer("https://h/t", None, &[]),
            ),
            (
                vec![r#"Basic realm="x""#, r#"Bearer realm="https://h/t""#],
                bearer("https://h/t", None, &[]),
            ),
            (
                vec![r#"Bearer realm="https://h/t""#, r#"Basic realm="x""#],
                bearer("https://h/t", None, &[]),
            ),
            (
                vec![r#"Negotiate YIIxyz/abc==, Basic realm="x""#],
                Some(Challenge::Basic),
            ),
            (
                vec!["Negotiate, NTLM, Basic realm=\"x\""],
                Some(Challenge::Basic),
            ),
            (
                vec![r#"Digest realm="x", qop="auth,auth-int", nonce="n", Basic realm="y""#],
                Some(Challenge::Basic),
            ),
            (vec![r#", ,Basic realm="x",,"#], Some(Challenge::Basic)),
            (vec![r#"Bearer realm="""#, "Basic"], Some(Challenge::Basic)),
            (vec![r#"Bearer service="x""#], None),
            (vec![r#"Bearer realm="unclosed"#], None),
            (vec![r#"Bearer realm="x\"#], None),
            (vec!["Digest nonce=x"], None),
            (vec![""], None),
            (vec!["=,=\"\"="], None),
            (vec![], None),
        ] {
            assert_eq!(choose(headers.iter().copied()), expected, "{headers:?}");
        }
    }

    #[test]
    fn long_and_strange_headers_end() {
        assert_eq!(choose([&*"a ".repeat(1 << 20)]), None);
        assert_eq!(
            choose([&*format!("Bearer {}", "x=y,".repeat(1 << 18))]),
            None
        );
        assert_eq!(choose([&*"\u{e4}".repeat(20_000)]), None);
        assert_eq!(choose(std::iter::repeat_n("Digest", 1_000_000)), None);
    }

    proptest::proptest! {
        #[test]
        fn no_header_panics(header in "(?s).{0,200}", quoted in "[ -~]{0,40}") {
            choose([header.as_str()]);
            let escaped = quoted.replace('\\', "\\\\").replace('"', "\\\"");
            let header = format!("Bearer service=\"{escaped}\", realm=\"r{escaped}\"");
            let Some(Challenge::Bearer { realm, .. }) = choose([header.as_str()]) else { panic!("{header}") };
            proptest::prop_assert_eq!(realm, format!("r{quoted}"));
        }
    }
}
