//! Who may become a host of this target: one-time tokens, enrolment, renewal.

use farshore_extent::{HostId, Problem, VolumeName, WallTime};
use farshore_protocol::token::{Token, TokenSecret, hash_secret};

use crate::authority::Authority;
use crate::catalogue::{HostRow, SharedCatalogue};
use crate::problem;

/// How long a token can be used when nothing else is said, in seconds.
pub const DEFAULT_TOKEN_SECONDS: u32 = 15 * 60;
/// Longest life of a token, in seconds: one day.
const MAX_TOKEN_SECONDS: u32 = 24 * 3600;

/// What a host sends to be enrolled.
pub(crate) struct Request<'a> {
    pub(crate) secret: &'a str,
    pub(crate) host: HostId,
    pub(crate) host_name: &'a str,
    pub(crate) csr: &'a [u8],
}

/// Makes a token for `host_name`; only the hash of its secret is kept.
pub(crate) fn new_token(
    authority: &Authority,
    catalogue: &SharedCatalogue,
    host_name: &str,
    valid_seconds: u32,
    address: &str,
) -> Result<String, Problem> {
    let name = VolumeName::new(host_name).map_err(|e| bad_token_request(&e))?;
    check_address(address).map_err(|e| bad_token_request(&e))?;
    let seconds = match valid_seconds {
        0 => DEFAULT_TOKEN_SECONDS,
        wanted => wanted.min(MAX_TOKEN_SECONDS),
    };
    let secret = TokenSecret::generate().map_err(|e| bad_token_request(&e))?;
    let expires = WallTime::now().nanos().saturating_add(i64::from(seconds) * 1_000_000_000);
    let hash = hash_secret(secret.as_str());
    catalogue.lock().put_token(hash, name.as_str(), WallTime::from_nanos(expires))?;
    catalogue.note(0, None, format!("a token for {name} was made, valid for {seconds} s"));
    let token = Token { address: address.to_owned(), ca: authority.fingerprint(), secret };
    Ok(token.to_string())
}

fn bad_token_request(why: &dyn std::fmt::Display) -> Problem {
    Problem::harmless(
        5010,
        "no token was made",
        why.to_string(),
        "for example: farshore token create --for db1 --address backup.example:9443",
    )
}

fn check_address(address: &str) -> Result<(), String> {
    let good = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && host.len() <= 255 && port.parse::<u16>().is_ok_and(|p| p != 0)
    });
    if good { Ok(()) } else { Err(format!("`{address}` is not HOST:PORT")) }
}

/// Takes the token and signs the request. The token is used up even when the rest fails: who
/// guesses gets one attempt, who errs gets a new token.
pub(crate) fn enroll(
    authority: &Authority,
    catalogue: &SharedCatalogue,
    request: &Request<'_>,
) -> Result<Vec<u8>, Problem> {
    let hash = hash_secret(request.secret);
    let Some(token_name) = catalogue.lock().take_token(hash, WallTime::now())? else {
        catalogue.note(
            5002,
            None,
            format!("a token was refused, shown by {:?}", request.host_name),
        );
        return Err(problem::bad_token());
    };
    let known = catalogue.lock().host(request.host)?;
    if request.host.is_nil() || known.is_some_and(|row| !row.removed && row.name != token_name) {
        catalogue.note(
            5007,
            None,
            format!("enrolment for {token_name} was refused: identity taken"),
        );
        return Err(problem::identity_taken());
    }
    let certificate = authority.sign_host(request.csr, request.host)?;
    // Durable before the host hears of it.
    catalogue.lock().put_host(&HostRow {
        host: request.host,
        name: token_name.clone(),
        enrolled: WallTime::now(),
        removed: false,
    })?;
    let called = request.host_name.escape_debug().to_string();
    catalogue.note(0, None, format!("{token_name} was enrolled; it calls itself {called}"));
    Ok(certificate)
}

/// A new certificate for a host whose old one is still good.
pub(crate) fn renew(
    authority: &Authority,
    catalogue: &SharedCatalogue,
    host: HostId,
    csr: &[u8],
) -> Result<Vec<u8>, Problem> {
    let row = require_enrolled(catalogue, host)?;
    let certificate = authority.sign_host(csr, host)?;
    catalogue.note(0, None, format!("the certificate of {} was renewed", row.name));
    Ok(certificate)
}

/// The row of a host whose certificate is still accepted.
pub(crate) fn require_enrolled(
    catalogue: &SharedCatalogue,
    host: HostId,
) -> Result<HostRow, Problem> {
    let row = catalogue.lock().host(host)?;
    row.filter(|row| !row.removed).ok_or_else(problem::host_removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::SqliteCatalogue;

    struct Bed {
        _dir: tempfile::TempDir,
        authority: Authority,
        catalogue: SharedCatalogue,
        csr: Vec<u8>,
    }

    fn bed() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let (authority, _) = Authority::init(&dir.path().join("ca"), &[]).unwrap();
        let file = dir.path().join("c.sqlite");
        let catalogue = SharedCatalogue::new(SqliteCatalogue::open(&file).unwrap());
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        Bed { authority, catalogue, csr: csr.der().to_vec(), _dir: dir }
    }

    impl Bed {
        fn token(&self, name: &str) -> Token {
            let text = new_token(&self.authority, &self.catalogue, name, 0, "backup:9443");
            text.unwrap().parse().unwrap()
        }

        fn enroll(&self, secret: &str, host: HostId) -> Result<Vec<u8>, Problem> {
            let request = Request { secret, host, host_name: "db1", csr: &self.csr };
            enroll(&self.authority, &self.catalogue, &request)
        }
    }

    #[test]
    fn a_token_enrols_one_host_once() {
        let bed = bed();
        let (token, host) = (bed.token("db1"), HostId::random());
        let secret = token.secret.as_str();
        assert_eq!(bed.enroll("guess", host).unwrap_err().code.0, 5002);
        bed.enroll(secret, host).unwrap();
        assert_eq!(bed.enroll(secret, HostId::random()).unwrap_err().code.0, 5002, "used");
        assert_eq!(require_enrolled(&bed.catalogue, host).unwrap().name, "db1");
        assert_eq!(token.ca, bed.authority.fingerprint());
    }

    #[test]
    fn a_token_for_one_host_cannot_take_the_identity_of_another() {
        let bed = bed();
        let host = HostId::random();
        bed.enroll(bed.token("db1").secret.as_str(), host).unwrap();
        let stolen = bed.enroll(bed.token("db2").secret.as_str(), host);
        assert_eq!(stolen.unwrap_err().code.0, 5007);
        bed.enroll(bed.token("db1").secret.as_str(), host).expect("the same host again");
    }

    #[test]
    fn a_removed_host_gets_no_new_certificate() {
        let bed = bed();
        let host = HostId::random();
        bed.enroll(bed.token("db1").secret.as_str(), host).unwrap();
        renew(&bed.authority, &bed.catalogue, host, &bed.csr).unwrap();
        let row = require_enrolled(&bed.catalogue, host).unwrap();
        bed.catalogue.lock().put_host(&HostRow { removed: true, ..row }).unwrap();
        let refused = renew(&bed.authority, &bed.catalogue, host, &bed.csr);
        assert_eq!(refused.unwrap_err().code.0, 5004);
    }

    #[test]
    fn tokens_are_made_only_for_names_and_addresses_that_can_work() {
        let bed = bed();
        for (name, address) in
            [("", "a:1"), ("db_1", "a:1"), ("db1", "a"), ("db1", ":1"), ("db1", "a:0")]
        {
            let refused = new_token(&bed.authority, &bed.catalogue, name, 0, address);
            assert_eq!(refused.unwrap_err().code.0, 5010, "{name} {address}");
        }
    }
}
