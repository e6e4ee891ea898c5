//! Views over TCP: only with TLS, only with a certificate of an enrolled host.

use std::path::{Path, PathBuf};

use base64::Engine;
use farshore_extent::{Lsn, PointKind, VolumeName};
use farshore_protocol::admin::{OpenView, PointChoice, TargetReply, TargetRequest, ViewInfo};
use farshore_protocol::token::SERVER_NAME;

use crate::bed::{Bed, Host};
use crate::points_and_views::run;
use crate::source::Source;

fn pem(label: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> =
        text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The directory that NBD clients with GnuTLS expect.
fn credentials(dir: &Path, host: &Host, with_certificate: bool) -> PathBuf {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("ca-cert.pem"), pem("CERTIFICATE", &host.ca)).unwrap();
    if with_certificate {
        let certificate = pem("CERTIFICATE", &host.certificate);
        std::fs::write(dir.join("client-cert.pem"), certificate).unwrap();
        std::fs::write(dir.join("client-key.pem"), pem("PRIVATE KEY", &host.key)).unwrap();
    }
    dir.to_owned()
}

async fn tls_view(bed: &Bed, point: Lsn) -> ViewInfo {
    let request = OpenView {
        tls_listen: Some("127.0.0.1:0".into()),
        ..OpenView::new(VolumeName::new("pgdata").unwrap(), PointChoice::At(point))
    };
    match bed.ask(TargetRequest::OpenView(request)).await {
        Ok(TargetReply::View(view)) => *view,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_over_tcp_needs_tls_and_an_enrolled_host() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 65_536, 1);
    let point = source.marker("", PointKind::Crash);
    source.ship(&mut connection).await;
    let view = tls_view(&bed, point).await;
    let address = view.tls_address.clone().unwrap();
    let image = bed.root().join("tls.img");
    let copy = |scheme: &str, dir: Option<PathBuf>| {
        let mut uri = format!("{scheme}://{address}/{}", view.export);
        if let Some(dir) = dir {
            uri += &format!("?tls-certificates={}&tls-hostname={SERVER_NAME}", dir.display());
        }
        run("nbdcopy", vec![uri, image.display().to_string()])
    };
    let good = credentials(&bed.root().join("good"), &host, true);
    let (ok, text) = copy("nbds", Some(good)).await;
    assert!(ok, "{text}");
    assert!(std::fs::read(&image).unwrap() == source.history[&point].1);
    let (ok, text) = copy("nbd", None).await;
    assert!(!ok, "without TLS: {text}");
    let nameless = credentials(&bed.root().join("nameless"), &host, false);
    let (ok, text) = copy("nbds", Some(nameless)).await;
    assert!(!ok, "without a certificate: {text}");
    let stranger = Bed::start().await.enroll("db1").await;
    let foreign = Host { ca: host.ca.clone(), ..stranger };
    let foreign = credentials(&bed.root().join("foreign"), &foreign, true);
    let (ok, text) = copy("nbds", Some(foreign)).await;
    assert!(!ok, "with a certificate of another target: {text}");
    let close = TargetRequest::CloseView { view: view.view, note: String::new() };
    bed.ask(close).await.unwrap();
    assert!(tokio::net::TcpStream::connect(&address).await.is_err(), "closed with the view");
}
