//! Who may ask: keys, host names and web origins. Knows no routes but which of them tell no secrets.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::ApiError;
use crate::places::Owner;
use crate::service::Options;

/// Decides by a request's head.
pub(crate) struct Gate {
    /// Digests of the keys: equally long, so that comparing them takes the same time.
    keys: Vec<[u8; 32]>,
    origins: Vec<String>,
    hosts: Vec<String>,
}

impl Gate {
    pub(crate) fn new(options: &Options) -> Gate {
        let digest = |key: &String| Sha256::digest(key.as_bytes()).into();
        Gate {
            keys: options.keys.iter().map(digest).collect(),
            origins: options.origins.clone(),
            hosts: options.hosts.clone(),
        }
    }

    /// Lets a request of `peer` in, and says whose it is.
    ///
    /// # Errors
    /// 401 without a key that fits, 403 for a host or an origin that is not answered.
    pub(crate) fn admit(&self, path: &str, headers: &HeaderMap, peer: IpAddr) -> Result<Owner, ApiError> {
        self.check_host(headers)?;
        self.check_origin(headers)?;
        if self.keys.is_empty() || is_public(path) {
            return Ok(Owner::of_peer(peer));
        }
        let refused =
            |message: &str| Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message));
        let Some(key) = key(headers) else {
            return refused("an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY");
        };
        let digest: [u8; 32] = Sha256::digest(key).into();
        // All keys are looked at, whichever fits.
        let mut found = None;
        for (number, known) in self.keys.iter().enumerate() {
            if bool::from(digest.ct_eq(known)) {
                found = Some(Owner::Key(number));
            }
        }
        match found {
            Some(owner) => Ok(owner),
            None => refused("the API key is not known"),
        }
    }

    /// A page elsewhere could otherwise reach a server on this machine by a name of its own (DNS rebinding).
    fn check_host(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.hosts.is_empty() {
            return Ok(());
        }
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let name = without_port(host);
        match self.hosts.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            true => Ok(()),
            false => Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "host_not_allowed",
                format!("the host {name:?} is not answered (hint: --allow-host)"),
            )),
        }
    }

    /// A page elsewhere could otherwise ask on behalf of whoever looks at it.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let own =
            origin.split_once("://").is_some_and(|(_, of)| !of.is_empty() && of.eq_ignore_ascii_case(host));
        match own || self.allows(origin) {
            true => Ok(()),
            false => Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "origin_not_allowed",
                format!("the web origin {origin:?} is not answered (hint: --cors)"),
            )),
        }
    }

    fn allows(&self, origin: &str) -> bool {
        self.origins.iter().any(|known| known == "*" || known == origin)
    }

    /// What a browser is told of an origin that is allowed.
    pub(crate) fn cors(&self, asked: &HeaderMap, answer: &mut HeaderMap) {
        let Some(origin) = asked.get(header::ORIGIN) else { return };
        if !origin.to_str().is_ok_and(|origin| self.allows(origin)) {
            return;
        }
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        answer.insert(header::VARY, HeaderValue::from_static("origin"));
        answer.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, retry-after"),
        );
    }

    /// The answer to a browser that asks whether it may ask.
    pub(crate) fn preflight(&self, method: &Method, asked: &HeaderMap, answer: &mut HeaderMap) -> bool {
        if method != Method::OPTIONS || !asked.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
            return false;
        }
        self.cors(asked, answer);
        if answer.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN) {
            answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
            answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
            let headers = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
            answer.extend(headers.map(|headers| (header::ACCESS_CONTROL_ALLOW_HEADERS, headers)));
        }
        true
    }
}

/// What anybody may read: the page itself, which asks for the key, and whether the server lives.
fn is_public(path: &str) -> bool {
    matches!(path, "/" | "/page.css" | "/page.js" | "/favicon.ico" | "/health")
}

fn key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| Some(headers.get("x-api-key")?.as_bytes()))
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // An IPv6 address has colons of its own, within brackets.
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (
                name.parse::<header::HeaderName>().expect("a name"),
                HeaderValue::from_str(value).expect("a value"),
            )
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn keys() {
        let options = Options { keys: vec!["one".into(), "two".into()], ..Options::default() };
        let gate = Gate::new(&options);
        let peer: IpAddr = "10.0.0.7".parse().expect("an address");
        let check = |path: &str, pairs: &[(&str, &str)], want: Result<Owner, u16>| {
            let got = gate.admit(path, &headers(pairs), peer).map_err(|error| error.status.as_u16());
            assert_eq!(got, want, "{path} {pairs:?}");
        };
        check("/v1/models", &[("authorization", "Bearer one")], Ok(Owner::Key(0)));
        check("/v1/models", &[("authorization", "bearer  two")], Ok(Owner::Key(1)));
        check("/v1/models", &[("x-api-key", "two")], Ok(Owner::Key(1)));
        for wrong in ["Bearer", "Bearer ", "Bearer on", "Bearer onee", "Basic one", "one", ""] {
            check("/v1/models", &[("authorization", wrong)], Err(401));
        }
        check("/v1/models", &[], Err(401));
        check("/metrics", &[], Err(401));
        check("/health", &[], Ok(Owner::Peer(peer)));
        check("/", &[], Ok(Owner::Peer(peer)));
    }

    #[test]
    fn without_keys_an_address_owns() {
        let gate = Gate::new(&Options::default());
        let peer = "10.0.0.7".parse().expect("an address");
        assert_eq!(gate.admit("/v1/models", &HeaderMap::new(), peer), Ok(Owner::Peer(peer)));
    }

    #[test]
    fn hosts_and_origins() {
        let options = Options {
            hosts: vec!["localhost".into(), "[::1]".into(), "127.0.0.1".into()],
            origins: vec!["https://a.example".into()],
            ..Options::default()
        };
        let gate = Gate::new(&options);
        let check = |host: &str, origin: &str, want: bool| {
            let mut pairs = vec![("host", host)];
            pairs.extend((!origin.is_empty()).then_some(("origin", origin)));
            assert_eq!(
                gate.admit("/", &headers(&pairs), IpAddr::from([127, 0, 0, 1])).is_ok(),
                want,
                "{pairs:?}"
            );
        };
        check("localhost:8080", "", true);
        check("LOCALHOST", "", true);
        check("[::1]:8080", "", true);
        check("[::1]", "", true);
        check("evil.example:8080", "", false);
        check("", "", false);
        check("localhost:8080", "http://localhost:8080", true);
        check("localhost:8080", "http://localhost:9090", false);
        check("localhost:8080", "https://a.example", true);
        check("localhost:8080", "https://evil.example", false);
        check("localhost:8080", "null", false);
    }
}
