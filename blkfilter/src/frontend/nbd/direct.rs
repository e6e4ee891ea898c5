//! Connections that begin in the transmission phase: the kernel's own client is told by netlink
//! what it would have negotiated.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::debug;

use super::handshake::Settled;
use super::request::Mode;
use super::socket::Socket;
use super::transmission::Transmission;
use crate::device::{Device, DeviceError};

/// A connection to the kernel's client.
#[derive(Debug)]
pub struct Direct(Arc<Socket>);

impl Direct {
    /// Our end of a connected stream socket.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(Socket::new(fd)))
    }

    /// Serves `device` by simple replies on the calling thread until the connection ends and
    /// everything in flight has come back. Returns whether the client said goodbye. `durable`:
    /// the client believes that there is no volatile cache, so each write is durable before its
    /// answer. A request is never refused for want of a buffer: it waits.
    ///
    /// # Errors
    /// [`DeviceError`] when the device gives no queue; the connection is then ended.
    pub fn serve(&self, device: Arc<dyn Device>, durable: bool) -> Result<bool, DeviceError> {
        let mode = Mode { kernel: true, durable, ..Mode::default() };
        let served = device.clone().open_queue().map(|queue| {
            if let Err(error) = self.0.make_blocking() {
                debug!(%error, "nbd: connection failed before it began");
                return false;
            }
            Transmission::new(self.0.clone(), Settled { device, mode, queue }).run()
        });
        self.cut();
        served
    }

    /// What has arrived is still answered; then [`Self::serve`] returns.
    pub fn end_input(&self) {
        self.0.end_input();
    }

    /// Ends both directions at once; what is in flight is still waited for.
    pub fn cut(&self) {
        self.0.cut();
    }
}
