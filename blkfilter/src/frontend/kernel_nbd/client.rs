//! What the kernel's client is asked for. Every call may wait in the kernel; each has a limit.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{major, minor};

use super::error::{KernelNbdError, Unavailable, system};
use super::message::{self, Connect, Family, KNOWS_IDENTIFIER};
use super::sysfs::{Sysfs, backend_of};
use crate::sys::process::may_administer;
use crate::sys::{isolate, netlink};

/// Longest wait for a call that only changes tables of the kernel.
const QUICK: Duration = Duration::from_secs(10);

/// Longest wait for a call that waits for requests in flight.
const SLOW: Duration = Duration::from_secs(60);

/// Somebody opening a device that is not attached (udev looks at each) makes it look used.
const OPENED_BY_CHANCE: Duration = Duration::from_secs(3);

/// The way to the kernel's client.
#[derive(Debug, Clone)]
pub struct Client {
    family: Family,
    /// What it says of its devices.
    pub sysfs: Sysfs,
}

impl Client {
    /// Finds the client.
    ///
    /// # Errors
    /// [`Unavailable`] when there is none that can do what we need.
    pub fn new() -> Result<Self, Unavailable> {
        let sysfs = Sysfs::default();
        let no = |why: String, remedy: &str| Unavailable { why, remedy: remedy.to_owned() };
        let answers = netlink::ask(message::get_family(), &[], QUICK, message::is_last)
            .and_then(|answers| message::verdict(&answers).map(|()| answers));
        let family = match answers {
            Ok(answers) => message::family(&answers),
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => None,
            Err(error) => {
                let why = format!("the kernel cannot be asked for its NBD client: {error}");
                return Err(no(why, "look whether generic netlink is allowed to this process"));
            }
        };
        let Some(family) = family else {
            let why = "the kernel module nbd is not loaded".to_owned();
            let remedy = "load it: modprobe nbd max_part=31 (and name it in \
                          /etc/modules-load.d/nbd.conf)";
            return Err(no(why, remedy));
        };
        if family.max_attribute < KNOWS_IDENTIFIER {
            let why = "the kernel's NBD client cannot tell whose a device is".to_owned();
            return Err(no(why, "use Linux 5.14 or later"));
        }
        if !may_administer() {
            let why = "this process may not attach block devices".to_owned();
            return Err(no(why, "run it as root (CAP_SYS_ADMIN)"));
        }
        Ok(Self { family, sysfs })
    }

    fn ask(
        &self,
        message: Vec<u8>,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> io::Result<Vec<Vec<u8>>> {
        let answers = netlink::ask(message, fds, limit, message::is_last)?;
        message::verdict(&answers)?;
        Ok(answers)
    }

    /// Makes a device of `sockets`, which are the kernel's from now on. Returns its number.
    ///
    /// # Errors
    /// [`KernelNbdError::Taken`], [`KernelNbdError::System`], [`KernelNbdError::Hangs`].
    pub fn connect(
        &self,
        device: &Connect<'_>,
        sockets: &[UnixStream],
    ) -> Result<u32, KernelNbdError> {
        let backend = backend_of(device.identifier);
        let device = Connect { identifier: &backend, ..*device };
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let numbers: Vec<_> = fds.iter().map(number_of).collect();
        let message = message::connect(self.family, &device, &numbers);
        let until = Instant::now() + OPENED_BY_CHANCE;
        loop {
            match (self.ask(message.clone(), &fds, QUICK), device.number) {
                (Ok(answers), asked) => {
                    return message::index(&answers).or(asked).ok_or_else(|| {
                        system("attach a device", QUICK)(io::ErrorKind::InvalidData.into())
                    });
                }
                (Err(error), Some(number)) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                    let taken = self.sysfs.is_configured(number);
                    if taken || Instant::now() > until {
                        let by = self.sysfs.owner(number);
                        return Err(KernelNbdError::Taken { number, by });
                    }
                    look_again();
                }
                (Err(error), _) => return Err(system("attach a device", QUICK)(error)),
            }
        }
    }

    /// Gives our device a new connection in place of a dead one. Returns our end of it; `None`
    /// when no connection of the device is dead.
    ///
    /// # Errors
    /// [`KernelNbdError::Gone`] when it is not attached any more, or not as `identifier`.
    pub fn reconnect(
        &self,
        number: u32,
        identifier: &str,
    ) -> Result<Option<OwnedFd>, KernelNbdError> {
        let (ours, theirs) = UnixStream::pair().map_err(system("make a socket", QUICK))?;
        let backend = backend_of(identifier);
        let fd = number_of(&theirs.as_fd());
        let message = message::replace_socket(self.family, number, &backend, fd);
        self.reconfigure(number, message, &[theirs.as_fd()], QUICK)?;
        // The kernel does not say whether it took the socket. If it did not, this was the last
        // reference to the other end.
        drop(theirs);
        Ok(if is_hung_up(&ours) { None } else { Some(ours.into()) })
    }

    /// Changes how long requests of our device wait for a connection.
    ///
    /// # Errors
    /// [`KernelNbdError`].
    pub fn set_dead_connection(
        &self,
        number: u32,
        identifier: &str,
        timeout: Duration,
    ) -> Result<(), KernelNbdError> {
        let backend = backend_of(identifier);
        let message = message::set_dead_connection(self.family, number, &backend, timeout);
        self.reconfigure(number, message, &[], QUICK)
    }

    /// Sets how long a request is outstanding before the kernel looks at it. Waits for the
    /// requests in flight, so there must be live connections.
    ///
    /// # Errors
    /// Of the file; without it the kernel's 30 s hold.
    pub fn set_request_timer(&self, number: u32, period: Duration) -> io::Result<()> {
        if self.sysfs.request_timer(number) == Some(period) {
            return Ok(());
        }
        let sysfs = self.sysfs.clone();
        isolate::run(&[], QUICK, move || sysfs.set_request_timer(number, period))
    }

    /// Changes the size of our device. Waits for the requests in flight, so there must be live
    /// connections.
    ///
    /// # Errors
    /// [`KernelNbdError`].
    pub fn set_size(&self, number: u32, identifier: &str, size: u64) -> Result<(), KernelNbdError> {
        let message = message::set_size(self.family, number, &backend_of(identifier), size);
        self.reconfigure(number, message, &[], SLOW)
    }

    fn reconfigure(
        &self,
        number: u32,
        message: Vec<u8>,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), KernelNbdError> {
        match self.ask(message, fds, limit) {
            Ok(_) => Ok(()),
            // Sizes and sockets are ours and right, so: not attached, or not as this identifier.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                Err(KernelNbdError::Gone(number))
            }
            Err(error) => Err(system("change a device", limit)(error)),
        }
    }

    /// Ends the device. Its users get errors. The kernel first sends its goodbye on every
    /// connection, so the connections must be served or dead.
    ///
    /// # Errors
    /// [`KernelNbdError::Hangs`], [`KernelNbdError::System`].
    pub fn disconnect(&self, number: u32, limit: Duration) -> Result<(), KernelNbdError> {
        let message = message::disconnect(self.family, number);
        self.ask(message, &[], limit).map(drop).map_err(system("disconnect a device", limit))
    }

    /// Waits until a disconnected device is free again: its last user has closed it.
    pub fn wait_free(&self, number: u32, limit: Duration) -> bool {
        wait_until(limit, || !self.sysfs.is_configured(number))
    }

    /// Waits for the node of the device `number`.
    ///
    /// # Errors
    /// [`KernelNbdError::NoNode`].
    pub fn wait_node(&self, number: u32, limit: Duration) -> Result<(), KernelNbdError> {
        let path = node(number);
        let expected = self.sysfs.device_number(number);
        let there = wait_until(limit, || expected.is_some() && device_number(&path) == expected);
        if there { Ok(()) } else { Err(KernelNbdError::NoNode(path)) }
    }
}

/// The path of a device's node.
pub fn node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{number}"))
}

/// Opens the device once: the kernel looks for partitions of an NBD device only then. Returns
/// whether that ended in time.
pub fn look_for_partitions(number: u32, limit: Duration) -> bool {
    let path = node(number);
    isolate::run(&[], limit, move || File::open(path).map(drop)).is_ok()
}

/// `major:minor` of a block device's node.
fn device_number(path: &Path) -> Option<String> {
    let node = fs::metadata(path).ok().filter(|node| node.file_type().is_block_device())?;
    Some(format!("{}:{}", major(node.rdev()), minor(node.rdev())))
}

fn number_of(fd: &BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs() // an open descriptor is not negative
}

fn is_hung_up(stream: &UnixStream) -> bool {
    let mut one = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let polled = poll(&mut one, PollTimeout::ZERO);
    polled.is_ok() && one[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

/// A pause before looking again at something that the kernel does not report.
fn look_again() {
    #[allow(clippy::disallowed_methods)] // nothing to wait on
    thread::sleep(Duration::from_millis(10));
}

fn wait_until(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        look_again();
    }
}
