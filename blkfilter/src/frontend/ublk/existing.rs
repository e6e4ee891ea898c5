//! Devices that the driver already has, and what to do with one.

use std::time::Duration;

use farshore_extent::VolumeSize;

use super::driver;
use super::error::UblkError;
use super::limits::SECTOR;
use crate::sys::ublk::uapi::{DevInfo, state};

/// How long the driver may take to describe a device.
const LIMIT: Duration = Duration::from_secs(5);

/// Where a device is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There is no block device: never started, or stopped.
    Dead,
    /// Served; or its server died a moment ago.
    Live,
    /// Nobody serves it and I/O waits.
    Quiesced,
    /// Nobody serves it and I/O fails.
    Failing,
    /// A state this program does not know.
    Unknown(u16),
}

impl State {
    fn of(number: u16) -> Self {
        match number {
            state::DEAD => Self::Dead,
            state::LIVE => Self::Live,
            state::QUIESCED => Self::Quiesced,
            state::FAIL_IO => Self::Failing,
            other => Self::Unknown(other),
        }
    }
}

/// A device as the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceState {
    /// Its number: `/dev/ublkbN`.
    pub number: u32,
    /// Where it is in its life. Decide by this, never by a process number.
    pub state: State,
    /// The word its maker left with the driver: [`Config::owner`](super::Config::owner) for ours.
    pub owner: u64,
    /// Feature bits it was made with.
    pub flags: u64,
    /// Its size; none when it was never given one.
    pub size: Option<VolumeSize>,
    /// Queues.
    pub queues: u16,
    /// Tags of each queue.
    pub depth: u16,
    /// Longest request in bytes.
    pub max_io_bytes: u32,
}

impl DeviceState {
    pub(super) fn of(info: &DevInfo, size: Option<VolumeSize>) -> Self {
        Self {
            number: info.device,
            state: State::of(info.state),
            owner: info.owner,
            flags: info.flags,
            size,
            queues: info.queues,
            depth: info.depth,
            max_io_bytes: info.max_io_bytes,
        }
    }
}

/// What the driver says of device `number`; none: there is no such device.
///
/// # Errors
/// [`UblkError::Unavailable`], or the driver does not answer.
pub fn existing(number: u32) -> Result<Option<DeviceState>, UblkError> {
    let Some(info) = driver::info(number, LIMIT)? else { return Ok(None) };
    let params = driver::params(number, LIMIT)?;
    let size = params.sectors.checked_mul(SECTOR).and_then(|bytes| VolumeSize::new(bytes).ok());
    Ok(Some(DeviceState::of(&info, size)))
}

/// The word that the maker of device `number` left with the driver; none: there is no such device.
/// Answered also while the device is being started, stopped or taken over.
///
/// # Errors
/// As [`existing`].
pub fn owner(number: u32) -> Result<Option<u64>, UblkError> {
    Ok(driver::info(number, LIMIT)?.map(|info| info.owner))
}

/// What [`Server::start`](super::Server::start) does about a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// There is nothing: make it.
    Add,
    /// Nobody ever saw it as a block device, or no longer: delete it, then make it.
    Replace,
    /// Take it over.
    Recover,
    /// Its server may be dying: look again.
    Wait,
    /// Not ours to touch.
    Refuse,
}

/// Decides by the state alone: some kernels keep the number of a process that is long dead.
pub(super) fn way(found: Option<&DevInfo>, owner: u64) -> Way {
    let Some(info) = found else { return Way::Add };
    if info.owner != owner {
        return Way::Refuse;
    }
    match State::of(info.state) {
        State::Dead => Way::Replace,
        State::Quiesced | State::Failing => Way::Recover,
        State::Live | State::Unknown(_) => Way::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_follows_from_owner_and_state_alone() {
        let found = |state| DevInfo { state, owner: 7, server_pid: 1, ..DevInfo::default() };
        let after = |state| way(Some(&found(state)), 7);
        assert_eq!(way(None, 7), Way::Add);
        assert_eq!(after(state::DEAD), Way::Replace);
        assert_eq!(after(state::LIVE), Way::Wait);
        assert_eq!(after(state::QUIESCED), Way::Recover);
        assert_eq!(after(state::FAIL_IO), Way::Recover);
        assert_eq!(after(99), Way::Wait);
        for other in [state::DEAD, state::LIVE, state::QUIESCED, state::FAIL_IO] {
            assert_eq!(way(Some(&found(other)), 8), Way::Refuse);
        }
    }
}
