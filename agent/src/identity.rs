//! Who this host is: identity, key, certificate, the CA it believes, and where the target is.
//! One file, replaced as a whole, readable by the agent's user only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_extent::{HostId, Problem, VolumeName};
use farshore_protocol::paths::Paths;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use crate::{durable_fs, problem};

/// What enrolment leaves behind.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Identity of the host, in its certificate.
    pub host: HostId,
    /// Name of the host, for people.
    pub name: VolumeName,
    /// `host:port` in the token.
    pub target: String,
    /// Private key, PKCS#8 PEM; made on this host, never sent.
    key: String,
    /// Certificate of the host, base64 of DER.
    certificate: String,
    /// The only CA this host believes, base64 of DER.
    ca: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({}, {}, target {}, key hidden)", self.host, self.name, self.target)
    }
}

/// A fresh key with its certificate request.
pub struct NewKey {
    key: KeyPair,
    /// The request, DER.
    pub csr: Vec<u8>,
}

impl NewKey {
    /// Makes a key on this machine.
    ///
    /// # Errors
    /// FS-5208 when the crypto library fails.
    pub fn generate(host: HostId) -> Result<Self, Problem> {
        let make = || {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, host.to_string());
            let csr = params.serialize_request(&key)?.der().to_vec();
            Ok::<_, rcgen::Error>(Self { key, csr })
        };
        make().map_err(|e| problem::bad_certificate(&e))
    }
}

impl Identity {
    /// Where it lies.
    #[must_use]
    pub fn file(paths: &Paths) -> PathBuf {
        paths.state.join("agent").join("identity.json")
    }

    /// Joins what enrolment gave. The certificate must be for `host` and for the key.
    ///
    /// # Errors
    /// FS-5208 when it is not.
    pub fn new(
        (host, name): (HostId, VolumeName),
        target: String,
        key: &NewKey,
        certificate: &[u8],
        ca: &[u8],
    ) -> Result<Self, Problem> {
        let identity = Self {
            host,
            name,
            target,
            key: key.key.serialize_pem(),
            certificate: encode(certificate),
            ca: encode(ca),
        };
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
            .map_err(|e| problem::bad_certificate(&e))?;
        let named = parsed.subject().iter_common_name().next().and_then(|n| n.as_str().ok());
        if named != Some(host.to_string().as_str()) {
            return Err(problem::bad_certificate(&"it names another host"));
        }
        // rustls compares key and certificate.
        identity.tls().map_err(|e| problem::bad_certificate(&e.why))?;
        Ok(identity)
    }

    /// The same host with a renewed key and certificate.
    ///
    /// # Errors
    /// FS-5208 when the certificate does not fit.
    pub fn renewed(&self, key: &NewKey, certificate: &[u8], ca: &[u8]) -> Result<Self, Problem> {
        if encode(ca) != self.ca {
            return Err(problem::bad_certificate(&"it comes from another CA"));
        }
        let who = (self.host, self.name.clone());
        Self::new(who, self.target.clone(), key, certificate, ca)
    }

    /// Reads it.
    ///
    /// # Errors
    /// FS-5201 when this host was never enrolled, FS-5204 when the file is unusable.
    pub fn load(paths: &Paths) -> Result<Self, Problem> {
        let file = Self::file(paths);
        let bytes = std::fs::read(&file).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => problem::not_enrolled(&file),
            _ => problem::identity(&file, &e),
        })?;
        serde_json::from_slice(&bytes).map_err(|e| problem::identity(&file, &e))
    }

    /// Makes it durable, all or nothing, mode 0600.
    ///
    /// # Errors
    /// FS-5205.
    pub fn save(&self, paths: &Paths) -> Result<(), Problem> {
        let file = Self::file(paths);
        let write = |file: &Path| {
            durable_fs::create_private_dir(file.parent().unwrap_or(Path::new(".")))?;
            let text = serde_json::to_vec_pretty(self)?;
            durable_fs::replace(file, &text, 0o600)
        };
        write(&file).map_err(|e| problem::file("write", &file, &e))
    }

    /// Seconds since 1970 after which the certificate should be renewed: when a third of its life
    /// is left.
    ///
    /// # Errors
    /// FS-5204 when the certificate cannot be read.
    pub fn renew_after(&self) -> Result<i64, Problem> {
        let (from, to) = self.validity()?;
        Ok(to - (to - from) / 3)
    }

    /// First and last second of the certificate, since 1970.
    ///
    /// # Errors
    /// FS-5204 when the certificate cannot be read.
    pub fn validity(&self) -> Result<(i64, i64), Problem> {
        let bad = |why: &dyn std::fmt::Display| problem::identity(Path::new("identity.json"), why);
        let der = decode(&self.certificate).map_err(|e| bad(&e))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|e| bad(&e))?;
        let validity = parsed.validity();
        Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
    }

    /// TLS 1.3, both sides authenticated: this host by its certificate, the target by a chain to
    /// the pinned CA and the fixed name that only the target's certificate carries.
    ///
    /// # Errors
    /// FS-5204 when key, certificate or CA are unusable or do not fit each other.
    pub fn tls(&self) -> Result<Arc<rustls::ClientConfig>, Problem> {
        let bad = |why: &dyn std::fmt::Display| problem::identity(Path::new("identity.json"), why);
        let key = KeyPair::from_pem(&self.key).map_err(|e| bad(&e))?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let certificate = CertificateDer::from(decode(&self.certificate).map_err(|e| bad(&e))?);
        let mut roots = rustls::RootCertStore::empty();
        let ca = CertificateDer::from(decode(&self.ca).map_err(|e| bad(&e))?);
        roots.add(ca).map_err(|e| bad(&e))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| bad(&e))?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)
            .map_err(|e| bad(&e))?;
        Ok(Arc::new(config))
    }
}

fn encode(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn decode(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text)
}
