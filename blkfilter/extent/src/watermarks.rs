//! How far each stage of the pipeline has come. One word for each stage; the order is asserted in
//! one place: `captured >= sent >= journaled` on the source, `received >= journaled >= applied` on
//! the target.

use crate::Lsn;

/// Watermarks out of order: a stage claims more than the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("watermark {later} at {later_lsn} is ahead of {earlier} at {earlier_lsn}")]
pub struct WatermarkError {
    earlier: &'static str,
    earlier_lsn: Lsn,
    later: &'static str,
    later_lsn: Lsn,
}

fn require(earlier: (&'static str, Lsn), later: (&'static str, Lsn)) -> Result<(), WatermarkError> {
    if later.1 <= earlier.1 {
        return Ok(());
    }
    Err(WatermarkError {
        earlier: earlier.0,
        earlier_lsn: earlier.1,
        later: later.0,
        later_lsn: later.1,
    })
}

/// What the source knows of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceWatermarks {
    captured: Lsn,
    sent: Lsn,
    journaled: Lsn,
}

impl SourceWatermarks {
    /// The only constructor; refuses a wrong order.
    ///
    /// # Errors
    /// [`WatermarkError`] naming the two stages.
    pub fn new(captured: Lsn, sent: Lsn, journaled: Lsn) -> Result<Self, WatermarkError> {
        require(("captured", captured), ("sent", sent))?;
        require(("sent", sent), ("journaled", journaled))?;
        Ok(Self { captured, sent, journaled })
    }

    /// Everything up to here has a number and is in the pool.
    #[must_use]
    pub const fn captured(self) -> Lsn {
        self.captured
    }

    /// Everything up to here was handed to the transport at least once.
    #[must_use]
    pub const fn sent(self) -> Lsn {
        self.sent
    }

    /// Everything up to here is durable at the target, which said so.
    #[must_use]
    pub const fn journaled(self) -> Lsn {
        self.journaled
    }
}

/// What the target knows of one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TargetWatermarks {
    received: Lsn,
    journaled: Lsn,
    applied: Lsn,
}

impl TargetWatermarks {
    /// The only constructor; refuses a wrong order.
    ///
    /// # Errors
    /// [`WatermarkError`] naming the two stages.
    pub fn new(received: Lsn, journaled: Lsn, applied: Lsn) -> Result<Self, WatermarkError> {
        require(("received", received), ("journaled", journaled))?;
        require(("journaled", journaled), ("applied", applied))?;
        Ok(Self { received, journaled, applied })
    }

    /// Everything up to here arrived and was checked.
    #[must_use]
    pub const fn received(self) -> Lsn {
        self.received
    }

    /// Everything up to here is durable in the journal; only this is ever acknowledged.
    #[must_use]
    pub const fn journaled(self) -> Lsn {
        self.journaled
    }

    /// Everything up to here is in the base.
    #[must_use]
    pub const fn applied(self) -> Lsn {
        self.applied
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epoch, Seq};

    #[test]
    fn a_stage_can_never_be_ahead_of_the_one_before_it() {
        let at = |n| Lsn::new(Epoch::new(1), Seq::new(n));
        assert!(SourceWatermarks::new(at(3), at(2), at(1)).is_ok());
        assert!(SourceWatermarks::new(at(3), at(4), at(1)).is_err());
        assert!(TargetWatermarks::new(at(3), at(2), at(3)).is_err());
    }
}
