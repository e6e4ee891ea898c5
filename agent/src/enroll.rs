//! Enrolment: a one-time token makes this host known to a target, and the target to this host.
//!
//! The token pins the target's CA by its fingerprint, so already the first connection is
//! authenticated in one direction; its secret authenticates the host once. The key is made here
//! and never leaves; what is sent is a certificate request.

use std::path::Path;
use std::sync::Arc;

use farshore_extent::{HostId, Problem, VolumeName};
use farshore_protocol::message::{FromAgent, FromTarget};
use farshore_protocol::paths::Paths;
use farshore_protocol::token::{CaFingerprint, Token};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};

use crate::config::{self, Config, split_address};
use crate::identity::{Identity, NewKey};
use crate::link::{Link, LinkConfig};
use crate::{durable_fs, problem};

/// What can be chosen at enrolment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EnrollOptions {
    /// Name of this host; none: the machine's own name.
    pub host_name: Option<VolumeName>,
    /// HTTP proxy, `host:port`; none: the one in `agent.toml`, if any.
    pub proxy: Option<String>,
}

/// What enrolment achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// Identity of this host; kept when it was enrolled before.
    pub host: HostId,
    /// Its name.
    pub host_name: VolumeName,
    /// `host:port` of the target.
    pub target: String,
    /// Fingerprint of the target's CA, for people to compare.
    pub ca: CaFingerprint,
    /// Whether this host was enrolled before, here or elsewhere.
    pub again: bool,
}

/// Enrolls this host. Nothing is changed unless everything succeeded.
///
/// # Errors
/// FS-5202 and FS-5203 for a token that is damaged or another target's, FS-5101 and FS-5106 when
/// the target cannot be reached, the target's own refusal (token used, expired or unknown),
/// FS-5205 when files cannot be written.
pub async fn enroll(
    token: &str,
    paths: &Paths,
    options: &EnrollOptions,
) -> Result<Enrolled, Problem> {
    let token: Token = token.parse().map_err(|e| problem::bad_token(&e))?;
    if split_address(&token.address).is_none() {
        let why = format!("its address `{}` is not HOST:PORT", token.address);
        return Err(problem::bad_token(&why));
    }
    let config = Config::load(paths)?;
    let before = match Identity::load(paths) {
        Ok(identity) => Some(identity),
        Err(p) if p.code == problem::not_enrolled(Path::new("")).code => None,
        Err(p) => return Err(p),
    };
    let host = before.as_ref().map_or_else(HostId::random, |i| i.host);
    let host_name = match (&options.host_name, &before) {
        (Some(name), _) => name.clone(),
        (None, Some(identity)) => identity.name.clone(),
        (None, None) => machine_name(),
    };
    let key = NewKey::generate(host)?;
    let proxy = options.proxy.clone().or_else(|| config.proxy.clone());
    let (certificate, ca) = ask(&token, proxy, host, &host_name, &key).await?;
    let who = (host, host_name.clone());
    let identity = Identity::new(who, token.address.clone(), &key, &certificate, &ca)?;
    write_default_config(paths, options)?;
    identity.save(paths)?;
    Ok(Enrolled { host, host_name, target: token.address, ca: token.ca, again: before.is_some() })
}

/// The exchange: certificate of the host and of the CA, DER.
async fn ask(
    token: &Token,
    proxy: Option<String>,
    host: HostId,
    host_name: &VolumeName,
    key: &NewKey,
) -> Result<(Vec<u8>, Vec<u8>), Problem> {
    let config = LinkConfig::new(token.address.clone(), proxy);
    let tls = pinned_tls(token.ca).map_err(|e| problem::bad_certificate(&e))?;
    let foreign = |p: Problem| {
        let is_other = p.code == problem::not_our_target("", &"").code;
        if is_other { problem::foreign_target(&token.address, &p.why) } else { p }
    };
    let mut link = Link::dial(&config, tls).await.map_err(|f| foreign(f.problem))?;
    let message = FromAgent::Enroll {
        secret: token.secret.as_str().to_owned(),
        host,
        host_name: host_name.to_string(),
        csr: key.csr.clone(),
    };
    match link.ask(&message).await.map_err(|f| foreign(f.problem))? {
        FromTarget::Certificate { certificate, ca } if CaFingerprint::of(&ca) == token.ca => {
            Ok((certificate, ca))
        }
        FromTarget::Certificate { .. } => {
            Err(problem::bad_certificate(&"it came with another CA than the token's"))
        }
        FromTarget::Welcome { .. }
        | FromTarget::Opened(_)
        | FromTarget::Refused { .. }
        | FromTarget::Ack { .. }
        | FromTarget::Reopen { .. }
        | FromTarget::Compared { .. }
        | FromTarget::Policy { .. }
        | FromTarget::Tag { .. }
        | FromTarget::Replica { .. }
        | FromTarget::Pong(_) => {
            Err(problem::violation(&token.address, &"it did not answer with a certificate"))
        }
    }
}

fn write_default_config(paths: &Paths, options: &EnrollOptions) -> Result<(), Problem> {
    let file = Config::file(paths);
    if file.exists() {
        return Ok(());
    }
    let mut text = config::DEFAULT_FILE.to_owned();
    if let Some(proxy) = &options.proxy {
        // The host and port were dialled already: no quote can be in them.
        text.push_str(&format!("\nproxy = \"{proxy}\"\n"));
    }
    let write = || {
        std::fs::create_dir_all(&paths.etc)?;
        durable_fs::replace(&file, text.as_bytes(), 0o644)
    };
    write().map_err(|e| problem::file("write", &file, &e))
}

/// The name of this machine, made to fit the rule for names.
fn machine_name() -> VolumeName {
    let name = nix::unistd::gethostname().ok();
    let name = name.as_ref().and_then(|n| n.to_str()).unwrap_or_default();
    let short = name.split('.').next().unwrap_or_default();
    let fit: String =
        short.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    let fallback = || VolumeName::new("host").expect("four letters are a name");
    VolumeName::new(fit.trim_matches('-')).unwrap_or_else(|_| fallback())
}

/// TLS that believes exactly the CA with this fingerprint and shows no certificate.
fn pinned_tls(ca: CaFingerprint) -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Arc::new(PinnedCa { ca, provider: provider.clone() });
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Finds the pinned CA among the certificates shown, then verifies as usual with it alone.
#[derive(Debug)]
struct PinnedCa {
    ca: CaFingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = intermediates
            .iter()
            .find(|c| CaFingerprint::of(c) == self.ca)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
