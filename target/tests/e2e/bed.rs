//! A daemon under test, its tokens and its hosts.

use std::path::Path;
use std::time::Duration;

use farshore_extent::{HostId, Problem};
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::message::{FromAgent, FromTarget};
use farshore_protocol::paths::Paths;
use farshore_protocol::token::Token;
use farshore_target::config::Config;
use farshore_target::{InitOptions, init, run};
use rustls::pki_types::CertificateDer;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::admin::ask;
use crate::connection::Connection;

/// Nothing in these tests takes so long unless it hangs.
pub const LONG: Duration = Duration::from_secs(60);

/// How to stop a daemon, and its end.
type Running = (oneshot::Sender<()>, JoinHandle<Result<(), Problem>>);

pub struct Bed {
    root: tempfile::TempDir,
    pub paths: Paths,
    running: Option<Running>,
}

/// An enrolled host.
#[derive(Clone)]
pub struct Host {
    pub id: HostId,
    pub name: String,
    pub key: Vec<u8>,
    pub certificate: CertificateDer<'static>,
    pub ca: CertificateDer<'static>,
}

impl Bed {
    /// A fresh target, running on any free port.
    pub async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        let options = InitOptions { listen: Some("127.0.0.1:0".into()), ..InitOptions::default() };
        init(&paths, &options).unwrap();
        let mut bed = Self { root, paths, running: None };
        bed.resume_with(change).await;
        bed
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub async fn resume(&mut self) {
        self.resume_with(|_| ()).await;
    }

    pub async fn resume_with(&mut self, change: impl FnOnce(&mut Config)) {
        assert!(self.running.is_none());
        let mut config = Config::load(&self.paths).unwrap();
        change(&mut config);
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(run(config, self.paths.clone(), shutdown));
        self.running = Some((stop, task));
        let up = async {
            while ask(&self.paths, TargetRequest::Views).await.is_none() {
                assert!(
                    !self.running.as_ref().unwrap().1.is_finished(),
                    "the daemon did not start"
                );
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LONG, up).await.expect("the daemon did not start in time");
    }

    /// An orderly stop.
    pub async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(LONG, task).await.expect("the daemon hangs").unwrap().unwrap();
    }

    pub fn address(&self) -> String {
        let text = std::fs::read_to_string(self.paths.run.join("target.listen")).unwrap();
        text.trim().to_owned()
    }

    pub async fn ask(&self, request: TargetRequest) -> Result<TargetReply, Problem> {
        ask(&self.paths, request).await.expect("the admin socket does not answer")
    }

    pub async fn token(&self, host_name: &str) -> Token {
        let request = TargetRequest::NewToken {
            host_name: host_name.into(),
            valid_seconds: 0,
            address: self.address(),
        };
        match self.ask(request).await.unwrap() {
            TargetReply::Token(text) => text.parse().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Enrols with a token, as an agent does.
    pub async fn enroll_with(
        &self,
        token: &Token,
        id: HostId,
        name: &str,
    ) -> Result<Host, Problem> {
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let mut connection = Connection::pinned(&token.address, token.ca).await;
        connection
            .send(&FromAgent::Enroll {
                secret: token.secret.as_str().to_owned(),
                host: id,
                host_name: name.into(),
                csr: csr.der().to_vec(),
            })
            .await;
        match connection.receive().await {
            Some(FromTarget::Certificate { certificate, ca }) => Ok(Host {
                id,
                name: name.into(),
                key: key.serialize_der(),
                certificate: certificate.into(),
                ca: ca.into(),
            }),
            Some(FromTarget::Refused { volume: None, problem, retry: false }) => Err(problem),
            other => panic!("{other:?}"),
        }
    }

    pub async fn enroll(&self, name: &str) -> Host {
        let token = self.token(name).await;
        self.enroll_with(&token, HostId::random(), name).await.unwrap()
    }

    /// A connection of an enrolled host that has said Hello and was welcomed.
    pub async fn connect(&self, host: &Host) -> Connection {
        let mut connection = Connection::of_host(&self.address(), host).await.unwrap();
        connection.send(&host.hello()).await;
        match connection.receive().await {
            Some(FromTarget::Welcome { version: 1, .. }) => connection,
            other => panic!("{other:?}"),
        }
    }
}

impl Host {
    pub fn hello(&self) -> FromAgent {
        FromAgent::Hello {
            versions: vec![1],
            host: self.id,
            host_name: self.name.clone(),
            software: "a test".into(),
        }
    }
}
