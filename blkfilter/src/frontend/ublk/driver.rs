//! Control commands as calls with their results.

use std::time::Duration;

use nix::errno::Errno;

use super::error::UblkError;
use super::features::Unavailable;
use crate::sys::ublk::control::{Answer, Call, CallError, Pending, begin, call};
use crate::sys::ublk::uapi::{Control, DevInfo, Params};

/// Stands for any device number.
pub(super) const ANY: u32 = u32::MAX;

/// Bytes of a CPU mask: 8192 CPUs.
const CPU_MASK: usize = 1024;

fn name(command: Control) -> &'static str {
    match command {
        Control::GetQueueAffinity => "GET_QUEUE_AFFINITY",
        Control::GetDevInfo => "GET_DEV_INFO",
        Control::AddDev => "ADD_DEV",
        Control::DelDev => "DEL_DEV",
        Control::StartDev => "START_DEV",
        Control::StopDev => "STOP_DEV",
        Control::SetParams => "SET_PARAMS",
        Control::GetParams => "GET_PARAMS",
        Control::StartUserRecovery => "START_USER_RECOVERY",
        Control::EndUserRecovery => "END_USER_RECOVERY",
        Control::GetFeatures => "GET_FEATURES",
        Control::UpdateSize => "UPDATE_SIZE",
        Control::TryStopDev => "TRY_STOP_DEV",
    }
}

fn unanswered(command: Control, error: CallError, limit: Duration) -> UblkError {
    match error {
        CallError::Late => UblkError::Late { command: name(command), limit },
        CallError::Behind(earlier) => UblkError::Behind { command: name(earlier) },
        CallError::Open(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV) => Unavailable::NoDriver.into(),
            Some(Errno::EPERM | Errno::EACCES) => Unavailable::NotPermitted.into(),
            _ => Unavailable::Failed(error.to_string()).into(),
        },
        CallError::Ring(error) => Unavailable::NoIoUring(error.to_string()).into(),
    }
}

fn refused(command: Control, result: i32) -> UblkError {
    match Errno::from_raw(result.wrapping_neg()) {
        Errno::EPERM => Unavailable::NotPermitted.into(),
        errno => UblkError::Refused { command: name(command), errno },
    }
}

/// The answer when the driver did it.
fn done(command: Control, answer: Answer) -> Result<Vec<u8>, UblkError> {
    if answer.result < 0 { Err(refused(command, answer.result)) } else { Ok(answer.buffer) }
}

fn send(
    command: Control,
    device: u32,
    data: u64,
    buffer: Vec<u8>,
    limit: Duration,
) -> Result<Vec<u8>, UblkError> {
    let answer = call(Call { command, device, data, buffer }, limit);
    done(command, answer.map_err(|error| unanswered(command, error, limit))?)
}

/// The driver's feature bits.
pub(super) fn features(limit: Duration) -> Result<u64, Unavailable> {
    let buffer = match send(Control::GetFeatures, ANY, 0, vec![0; 8], limit) {
        Ok(buffer) => buffer,
        Err(UblkError::Unavailable(why)) => return Err(why),
        Err(UblkError::Late { .. } | UblkError::Behind { .. }) => return Err(Unavailable::Hangs),
        Err(UblkError::Refused {
            errno: Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENODEV,
            ..
        }) => {
            return Err(Unavailable::Missing { feature: "GET_FEATURES" });
        }
        Err(other) => return Err(Unavailable::Failed(other.to_string())),
    };
    let bytes = buffer.try_into().map_err(|_| Unavailable::Failed("a short answer".into()))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// What the driver knows of a device; none: there is no such device.
pub(super) fn info(device: u32, limit: Duration) -> Result<Option<DevInfo>, UblkError> {
    match send(Control::GetDevInfo, device, 0, vec![0; DevInfo::LEN], limit) {
        Ok(buffer) => Ok(Some(DevInfo::decode(&buffer))),
        Err(UblkError::Refused { errno: Errno::ENODEV, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a device. Returns what was granted.
pub(super) fn add(wanted: &DevInfo, limit: Duration) -> Result<DevInfo, UblkError> {
    let buffer = send(Control::AddDev, wanted.device, 0, wanted.encode().into(), limit)?;
    Ok(DevInfo::decode(&buffer))
}

/// Sets the limits of a device that was never started.
pub(super) fn set_params(device: u32, params: &Params, limit: Duration) -> Result<(), UblkError> {
    send(Control::SetParams, device, 0, params.encode().into(), limit).map(drop)
}

/// The limits of a device.
pub(super) fn params(device: u32, limit: Duration) -> Result<Params, UblkError> {
    let buffer = Params::default().encode().into();
    Ok(Params::decode(&send(Control::GetParams, device, 0, buffer, limit)?))
}

/// The CPUs whose requests go to a queue, as a mask.
pub(super) fn affinity(device: u32, queue: u16, limit: Duration) -> Result<Vec<u8>, UblkError> {
    send(Control::GetQueueAffinity, device, u64::from(queue), vec![0; CPU_MASK], limit)
}

/// A command without a buffer.
pub(super) fn order(
    command: Control,
    device: u32,
    data: u64,
    limit: Duration,
) -> Result<(), UblkError> {
    send(command, device, data, Vec::new(), limit).map(drop)
}

/// A command without a buffer whose end is waited for later.
pub(super) struct Order {
    command: Control,
    pending: Pending,
}

impl Order {
    /// Sends it.
    pub(super) fn begin(command: Control, device: u32, data: u64) -> Result<Self, UblkError> {
        let pending = begin(Call { command, device, data, buffer: Vec::new() })
            .map_err(|error| unanswered(command, error, Duration::ZERO))?;
        Ok(Self { command, pending })
    }

    /// Waits for its end: `None` when the time has passed.
    pub(super) fn wait(&self, limit: Duration) -> Option<Result<(), UblkError>> {
        match self.pending.wait(limit) {
            Err(CallError::Late) => None,
            Err(error) => Some(Err(unanswered(self.command, error, limit))),
            Ok(answer) => Some(done(self.command, answer).map(drop)),
        }
    }

    /// Gives it up, with the error of having waited for `limit` in vain. Until it has ended, nothing
    /// else is sent to the device.
    pub(super) fn give_up(&self, limit: Duration) -> UblkError {
        self.pending.give_up();
        UblkError::Late { command: name(self.command), limit }
    }
}
