//! A connection as an agent has it: TLS 1.3, frames, messages.

use std::sync::Arc;

use farshore_changelog::codec;
use farshore_extent::{Chain, Lsn, VolumeId};
use farshore_protocol::frame::{FrameKind, HEADER_LEN};
use farshore_protocol::message::{FromAgent, FromTarget};
use farshore_protocol::token::{CaFingerprint, SERVER_NAME};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::bed::{Host, LONG};

pub struct Connection {
    pub stream: TlsStream<TcpStream>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Believes exactly the CA with the fingerprint, sent as the last of the chain.
#[derive(Debug)]
struct Pinned(CaFingerprint);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = intermediates.last().ok_or(rustls::Error::General("no CA was sent".into()))?;
        if CaFingerprint::of(ca) != self.0 {
            return Err(rustls::Error::General("another CA".into()));
        }
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let web = rustls::client::WebPkiServerVerifier::builder_with_provider(
            Arc::new(roots),
            provider(),
        );
        let web = web.build().map_err(|e| rustls::Error::General(e.to_string()))?;
        web.verify_server_cert(end_entity, intermediates, server_name, &[], now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The TLS side of an enrolled host.
pub fn host_config(host: &Host) -> ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(host.ca.clone()).unwrap();
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![host.certificate.clone()],
            PrivateKeyDer::try_from(host.key.clone()).unwrap(),
        )
        .unwrap()
}

async fn connect(address: &str, config: ClientConfig) -> std::io::Result<Connection> {
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let connected = TlsConnector::from(Arc::new(config)).connect(name, tcp);
    let stream = tokio::time::timeout(LONG, connected).await.expect("TLS hangs")?;
    Ok(Connection { stream })
}

impl Connection {
    /// Without a certificate, the CA pinned by its fingerprint: as at enrolment.
    pub async fn pinned(address: &str, ca: CaFingerprint) -> Self {
        Self::try_pinned(address, ca).await.unwrap()
    }

    pub async fn try_pinned(address: &str, ca: CaFingerprint) -> std::io::Result<Self> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Pinned(ca)))
            .with_no_client_auth();
        connect(address, config).await
    }

    /// With the certificate of a host.
    pub async fn of_host(address: &str, host: &Host) -> std::io::Result<Self> {
        connect(address, host_config(host)).await
    }

    pub async fn raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    async fn frame(&mut self, kind: FrameKind, body: &[u8]) -> std::io::Result<()> {
        let mut bytes = kind.header(body.len()).unwrap().to_vec();
        bytes.extend_from_slice(body);
        self.raw(&bytes).await
    }

    pub async fn send(&mut self, message: &FromAgent) {
        let body = codec::encode(message).unwrap();
        self.frame(FrameKind::Control, &body).await.unwrap();
    }

    pub async fn batch(&mut self, bytes: &[u8]) {
        self.frame(FrameKind::Batch, bytes).await.unwrap();
    }

    /// The next message; none when the target has closed the connection.
    pub async fn receive(&mut self) -> Option<FromTarget> {
        tokio::time::timeout(LONG, self.read()).await.expect("the target says nothing")
    }

    async fn read(&mut self) -> Option<FromTarget> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).await.ok()?;
        let (kind, len) = FrameKind::parse(header).unwrap();
        assert_eq!(kind, FrameKind::Control);
        let mut body = vec![0; len];
        self.stream.read_exact(&mut body).await.ok()?;
        Some(codec::decode(&body).unwrap())
    }

    /// The next message that is not the periodic report.
    pub async fn next(&mut self) -> Option<FromTarget> {
        loop {
            match self.receive().await {
                Some(FromTarget::Replica { .. }) => {}
                other => return other,
            }
        }
    }

    /// Waits until everything up to `lsn` is acknowledged; other messages are an error.
    pub async fn acked(&mut self, volume: VolumeId, lsn: Lsn) -> Chain {
        loop {
            match self.next().await {
                Some(FromTarget::Ack { volume: of, durable, chain }) if of == volume => {
                    if durable >= lsn {
                        assert_eq!(durable, lsn, "more was acknowledged than was sent");
                        return chain;
                    }
                }
                other => panic!("instead of an ack: {other:?}"),
            }
        }
    }
}
