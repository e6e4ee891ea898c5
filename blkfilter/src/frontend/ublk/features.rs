//! What the driver of this machine can do, asked at run time: the kernel's version tells nothing.

use std::time::Duration;

use super::driver;
use crate::sys::ublk::uapi::feature;

/// How long the driver may take to say what it can do.
const LIMIT: Duration = Duration::from_secs(5);

/// What every volume needs: without these there would be no way through a crash.
const REQUIRED: u64 =
    feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | feature::CMD_IOCTL_ENCODE;

/// The driver's feature bits. All that is required is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Of a mask.
    ///
    /// # Errors
    /// [`Unavailable::Missing`] with the first required feature that is not there.
    pub fn of(bits: u64) -> Result<Self, Unavailable> {
        let missing = REQUIRED & !bits;
        if missing == 0 {
            return Ok(Self(bits));
        }
        let name = feature::NAMES.get(missing.trailing_zeros() as usize);
        Err(Unavailable::Missing { feature: name.unwrap_or(&"an unnamed feature") })
    }

    /// The mask.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Payload goes straight into our buffers; otherwise it is copied once more.
    #[must_use]
    pub fn user_copy(self) -> bool {
        self.0 & feature::USER_COPY != 0
    }

    /// A device can grow while it is in use.
    #[must_use]
    pub fn update_size(self) -> bool {
        self.0 & feature::UPDATE_SIZE != 0
    }

    /// The driver itself refuses to stop a device that somebody has open.
    #[must_use]
    pub fn safe_stop(self) -> bool {
        self.0 & feature::SAFE_STOP_DEV != 0
    }

    /// Partitions can be left alone.
    #[must_use]
    pub fn no_partition_scan(self) -> bool {
        self.0 & feature::NO_AUTO_PART_SCAN != 0
    }

    /// The names of the bits that are set, for people.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        let set = |(bit, name): (usize, &&'static str)| (self.0 >> bit & 1 == 1).then_some(*name);
        feature::NAMES.iter().enumerate().filter_map(set).collect()
    }
}

/// Why ublk cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// No control device.
    #[error("/dev/ublk-control does not exist: load the driver with `modprobe ublk_drv`")]
    NoDriver,
    /// Opening the control device, or using it, is refused.
    #[error("using /dev/ublk-control is not permitted: it takes root with CAP_SYS_ADMIN")]
    NotPermitted,
    /// There is no ring to send commands through.
    #[error("io_uring cannot be used: {0} (see the sysctl kernel.io_uring_disabled)")]
    NoIoUring(String),
    /// The driver is too old.
    #[error("the ublk driver has no {feature}: use Linux 6.5 or later")]
    Missing {
        /// Its name.
        feature: &'static str,
    },
    /// The driver does not answer: an earlier command has got stuck in it.
    #[error("the ublk driver does not answer: it hangs in an earlier command; reboot to free it")]
    Hangs,
    /// Anything else the driver or the kernel said.
    #[error("the ublk driver cannot be asked: {0}")]
    Failed(String),
}

/// Asks the driver.
///
/// # Errors
/// [`Unavailable`], with what to do about it.
pub fn features() -> Result<Features, Unavailable> {
    Features::of(driver::features(LIMIT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_from_the_mask_of_the_driver() {
        let trixie = Features::of(0x1fe).unwrap();
        assert!(trixie.user_copy() && !trixie.update_size() && !trixie.safe_stop());
        assert_eq!(trixie.names().len(), 8);
        let forky = Features::of(0xf_ffff).unwrap();
        assert!(forky.update_size() && forky.safe_stop() && forky.no_partition_scan());
        assert_eq!(forky.names().last(), Some(&"SHMEM_ZC"));
    }

    #[test]
    fn a_driver_without_reissue_is_refused_by_name() {
        let error = Features::of(0x1fe & !feature::USER_RECOVERY_REISSUE).unwrap_err();
        assert_eq!(error, Unavailable::Missing { feature: "USER_RECOVERY_REISSUE" });
        assert!(error.to_string().contains("USER_RECOVERY_REISSUE"));
    }
}
