//! The target's own certificate authority: keys, server certificate, certificates of hosts.
//!
//! A host is its certificate: common name and `urn:uuid:` name are the [`HostId`]. The CA signs
//! exactly one server (this one) and clients; a client's certificate can serve nobody. Owns the
//! files in `ca/`; decides nothing about who may enrol.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_extent::{HostId, Problem};
use farshore_protocol::token::{CaFingerprint, SERVER_NAME};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use time::{Duration, OffsetDateTime};

use crate::{durable_fs, problem};

const CA_DAYS: i64 = 365 * 20;
const SERVER_DAYS: i64 = 365 * 2;
/// The server's certificate is made anew at a start when it ends within this time.
const SERVER_RENEW_DAYS: i64 = 365;
const HOST_DAYS: i64 = 365;
/// Clocks of source and target may differ by this much.
const CLOCK_SKEW: Duration = Duration::hours(24);
/// Longest certificate request that is parsed, in bytes; ours have about 300.
const MAX_CSR: usize = 16 << 10;

/// The authority, loaded.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: CertificateDer<'static>,
    dir: PathBuf,
}

struct Files {
    ca_key: PathBuf,
    ca: PathBuf,
    server_key: PathBuf,
    server: PathBuf,
}

impl Files {
    fn of(dir: &Path) -> Self {
        Self {
            ca_key: dir.join("ca-key.pem"),
            ca: dir.join("ca.pem"),
            server_key: dir.join("server-key.pem"),
            server: dir.join("server.pem"),
        }
    }
}

impl Authority {
    /// Makes keys and certificates in `dir` where they are missing; says whether any was.
    /// Whatever is there stays, so a crash in the middle is mended by calling again.
    ///
    /// # Errors
    /// FS-6502 and FS-6505.
    pub fn init(dir: &Path, names: &[String]) -> Result<(Self, bool), Problem> {
        durable_fs::create_private_dir(dir).map_err(|e| problem::file("create", dir, &e))?;
        let files = Files::of(dir);
        let mut made = false;
        if !files.ca_key.exists() {
            if files.ca.exists() {
                return Err(problem::certificate(&files.ca_key, &"the file is missing"));
            }
            write_key(&files.ca_key, &new_key(&files.ca_key)?)?;
            made = true;
        }
        if !files.ca.exists() {
            let key = read_key(&files.ca_key)?;
            let certificate =
                ca_params().self_signed(&key).map_err(|e| problem::certificate(&files.ca, &e))?;
            write_public(&files.ca, &certificate.pem())?;
            made = true;
        }
        let authority = Self::load(dir)?;
        if !files.server.exists() || !files.server_key.exists() {
            authority.make_server_certificate(names)?;
            made = true;
        }
        Ok((authority, made))
    }

    /// Reads the authority that [`Self::init`] made.
    ///
    /// # Errors
    /// FS-6501 when there is none, FS-6505 when a file is unusable.
    pub fn load(dir: &Path) -> Result<Self, Problem> {
        let files = Files::of(dir);
        if !files.ca.exists() {
            return Err(problem::not_initialised(&files.ca));
        }
        let key = read_key(&files.ca_key)?;
        let ca = read_certificate(&files.ca)?;
        let issuer =
            Issuer::from_ca_cert_der(&ca, key).map_err(|e| problem::certificate(&files.ca, &e))?;
        Ok(Self { issuer, ca, dir: dir.to_owned() })
    }

    /// What tokens pin.
    #[must_use]
    pub fn fingerprint(&self) -> CaFingerprint {
        CaFingerprint::of(&self.ca)
    }

    /// The CA's certificate, DER.
    #[must_use]
    pub fn ca_certificate(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// Signs the request of `host`. Only its public key is used: names, usages and times are
    /// ours to decide.
    ///
    /// # Errors
    /// FS-5009 when the request is malformed or its signature is wrong.
    pub fn sign_host(&self, csr: &[u8], host: HostId) -> Result<Vec<u8>, Problem> {
        if csr.len() > MAX_CSR {
            return Err(problem::bad_request(format!("it has {} bytes", csr.len())));
        }
        let csr = CertificateSigningRequestDer::from(csr);
        let mut request =
            CertificateSigningRequestParams::from_der(&csr).map_err(problem::bad_request)?;
        let mut params = leaf_params(&host.to_string(), HOST_DAYS);
        let uri = format!("urn:uuid:{host}").try_into().map_err(problem::bad_request)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        request.params = params;
        let certificate = request.signed_by(&self.issuer).map_err(problem::bad_request)?;
        Ok(certificate.der().to_vec())
    }

    /// TLS of the replication port: 1.3 only, certificates of hosts asked for and verified
    /// against this CA, none at all let through (enrolment; the session decides). The server's
    /// certificate is made anew when it ends soon.
    ///
    /// # Errors
    /// FS-6505.
    pub fn server_tls(&self, names: &[String]) -> Result<Arc<rustls::ServerConfig>, Problem> {
        self.tls(names, false)
    }

    fn tls(
        &self,
        names: &[String],
        certificate_required: bool,
    ) -> Result<Arc<rustls::ServerConfig>, Problem> {
        let files = Files::of(&self.dir);
        if self.server_ends_soon(&files.server) {
            self.make_server_certificate(names)?;
        }
        let bad = |e: &dyn std::fmt::Display| problem::certificate(&files.server, e);
        let key = PrivateKeyDer::from_pem_file(&files.server_key)
            .map_err(|e| problem::certificate(&files.server_key, &e))?;
        let chain = vec![read_certificate(&files.server)?, self.ca.clone()];
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.clone()).map_err(|e| bad(&e))?;
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::clone(&provider),
        );
        let verifier =
            if certificate_required { verifier } else { verifier.allow_unauthenticated() };
        let verifier = verifier.build().map_err(|e| bad(&e))?;
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| bad(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| bad(&e))?;
        Ok(Arc::new(config))
    }

    /// TLS of exported views: as [`Self::server_tls`], but a certificate of a host is required.
    ///
    /// # Errors
    /// FS-6505.
    pub fn export_tls(&self, names: &[String]) -> Result<Arc<rustls::ServerConfig>, Problem> {
        self.tls(names, true)
    }

    fn make_server_certificate(&self, names: &[String]) -> Result<(), Problem> {
        let files = Files::of(&self.dir);
        let key = new_key(&files.server_key)?;
        let mut params = leaf_params(SERVER_NAME, SERVER_DAYS);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in [SERVER_NAME].into_iter().chain(names.iter().map(String::as_str)) {
            params.subject_alt_names.push(alt_name(name, &files.server)?);
        }
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(|e| problem::certificate(&files.server, &e))?;
        // The key first: a certificate without its key would look complete.
        write_key(&files.server_key, &key)?;
        write_public(&files.server, &certificate.pem())
    }

    fn server_ends_soon(&self, file: &Path) -> bool {
        let Ok(certificate) = read_certificate(file) else { return true };
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(&certificate) else {
            return true;
        };
        let limit = OffsetDateTime::now_utc() + Duration::days(SERVER_RENEW_DAYS);
        parsed.validity().not_after.timestamp() < limit.unix_timestamp()
    }
}

/// Private keys in the directory of an authority.
#[must_use]
pub fn key_files(dir: &Path) -> [PathBuf; 2] {
    let files = Files::of(dir);
    [files.ca_key, files.server_key]
}

/// First and last second, since 1970, of the certificates of an authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Of the CA.
    pub ca: (i64, i64),
    /// Of the server; made anew at a start of the daemon in the last year.
    pub server: (i64, i64),
}

/// How long the certificates of the authority in `dir` are valid.
///
/// # Errors
/// FS-6505 when one cannot be read.
pub fn validity(dir: &Path) -> Result<Validity, Problem> {
    let files = Files::of(dir);
    let of = |file: &Path| -> Result<(i64, i64), Problem> {
        let certificate = read_certificate(file)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate)
            .map_err(|e| problem::certificate(file, &e))?;
        let validity = parsed.validity();
        Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
    };
    Ok(Validity { ca: of(&files.ca)?, server: of(&files.server)? })
}

/// The host that a verified client certificate names.
#[must_use]
pub fn host_of(certificate: &CertificateDer<'_>) -> Option<HostId> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    name.parse().ok()
}

fn ca_params() -> CertificateParams {
    let mut params = leaf_params("Farshore target CA", CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = false;
    params
}

fn leaf_params(common_name: &str, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(days);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn alt_name(name: &str, file: &Path) -> Result<SanType, Problem> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let dns = name.to_owned().try_into().map_err(|e| problem::certificate(file, &e))?;
    Ok(SanType::DnsName(dns))
}

fn new_key(file: &Path) -> Result<KeyPair, Problem> {
    KeyPair::generate().map_err(|e| problem::certificate(file, &e))
}

fn read_key(file: &Path) -> Result<KeyPair, Problem> {
    let text = std::fs::read_to_string(file).map_err(|e| problem::certificate(file, &e))?;
    KeyPair::from_pem(&text).map_err(|e| problem::certificate(file, &e))
}

fn write_key(file: &Path, key: &KeyPair) -> Result<(), Problem> {
    durable_fs::replace(file, key.serialize_pem().as_bytes(), 0o600)
        .map_err(|e| problem::file("write", file, &e))
}

fn read_certificate(file: &Path) -> Result<CertificateDer<'static>, Problem> {
    CertificateDer::from_pem_file(file).map_err(|e| problem::certificate(file, &e))
}

fn write_public(file: &Path, pem: &str) -> Result<(), Problem> {
    durable_fs::replace(file, pem.as_bytes(), 0o644).map_err(|e| problem::file("write", file, &e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn csr(common_name: &str) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["farshore-target".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    #[test]
    fn a_second_init_changes_nothing_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let (first, made) = Authority::init(&ca, &["backup".into(), "10.0.0.1".into()]).unwrap();
        assert!(made);
        let before = std::fs::read(ca.join("server.pem")).unwrap();
        let (second, made) = Authority::init(&ca, &[]).unwrap();
        assert!(!made);
        assert_eq!(first.fingerprint(), second.fingerprint());
        assert_eq!(std::fs::read(ca.join("server.pem")).unwrap(), before);
        for key in ["ca-key.pem", "server-key.pem"] {
            let mode = std::fs::metadata(ca.join(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        second.server_tls(&[]).unwrap();
    }

    #[test]
    fn an_init_cut_short_is_completed_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let (first, _) = Authority::init(dir.path(), &[]).unwrap();
        std::fs::remove_file(dir.path().join("server.pem")).unwrap();
        let (second, made) = Authority::init(dir.path(), &[]).unwrap();
        assert!(made);
        assert_eq!(first.fingerprint(), second.fingerprint());
        std::fs::remove_file(dir.path().join("ca-key.pem")).unwrap();
        let lost = Authority::init(dir.path(), &[]).err().unwrap();
        assert_eq!(lost.code.0, 6505, "a lost CA key is never replaced in silence");
    }

    #[test]
    fn a_request_gets_our_names_and_usages_whatever_it_asks_for() {
        let dir = tempfile::tempdir().unwrap();
        let (authority, _) = Authority::init(dir.path(), &[]).unwrap();
        let host = HostId::random();
        let der = authority.sign_host(&csr("somebody else"), host).unwrap();
        let certificate = CertificateDer::from(der);
        assert_eq!(host_of(&certificate), Some(host));
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !parsed.is_ca());
        let days = (parsed.validity().not_after.timestamp()
            - OffsetDateTime::now_utc().unix_timestamp())
            / 86_400;
        assert!((360..=366).contains(&days), "{days}");
    }

    #[test]
    fn damaged_requests_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (authority, _) = Authority::init(dir.path(), &[]).unwrap();
        let good = csr("x");
        let mut forged = good.clone();
        let last = forged.len() - 1;
        forged[last] ^= 1;
        for bad in [&[][..], b"junk", &good[..good.len() / 2], &forged, &vec![0; MAX_CSR + 1]] {
            assert_eq!(authority.sign_host(bad, HostId::random()).unwrap_err().code.0, 5009);
        }
    }
}
