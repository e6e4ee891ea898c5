//! A new certificate before the old one ends.

use farshore_extent::WallTime;
use farshore_protocol::message::FromAgent;

use super::Driver;
use crate::identity::NewKey;

impl Driver {
    /// Asks for a new certificate when a third of the old one's life is left.
    pub(super) fn renew(&mut self) {
        let up = self.connection.as_ref().is_some_and(|c| c.up);
        let due = || {
            let now = WallTime::now().nanos() / 1_000_000_000;
            self.identity.renew_after().is_ok_and(|after| after <= now)
        };
        if !up || self.renewing.is_some() || !due() {
            return;
        }
        match NewKey::generate(self.identity.host) {
            Ok(key) => {
                self.send(FromAgent::Renew { csr: key.csr.clone() });
                self.renewing = Some(key);
            }
            Err(problem) => tracing::error!(%problem, "no key for a new certificate"),
        }
    }

    pub(super) fn renewed(&mut self, certificate: &[u8], ca: &[u8]) {
        let Some(key) = self.renewing.take() else { return };
        let saved = self.identity.renewed(&key, certificate, ca).and_then(|identity| {
            tokio::task::block_in_place(|| identity.save(&self.paths))?;
            Ok(identity)
        });
        match saved {
            Ok(identity) => {
                tracing::info!("the certificate of this host was renewed");
                self.identity = identity;
            }
            Err(problem) => tracing::error!(%problem, "the renewed certificate cannot be used"),
        }
    }
}
