//! The words of the domain: identities, numbers and extents, each with a type of its own.
//!
//! Owns no I/O, no clock and no state; everything here is plain data that every other crate
//! speaks. Names follow GLOSSARY.md. A number of the domain never travels as a bare `u64`:
//! mixing up a sequence number and an offset must not compile.
#![forbid(unsafe_code)]

mod chunk_map;
mod extent;
mod extent_set;
mod id;
mod name;
mod number;
mod point;
mod problem;
mod watermarks;

pub use chunk_map::{ChunkMap, ChunkSize};
pub use extent::{BlockSizes, Extent, ExtentError, SECTOR, VolumeSize};
pub use extent_set::ExtentSet;
pub use id::{GroupId, HostId, IdError, MarkerId, PointId, ViewId, VolumeId};
pub use name::{NameError, VolumeName};
pub use number::{Chain, Epoch, Generation, Lsn, Seq, WallTime};
pub use point::{CaptureOrder, PairState, PointKind};
pub use problem::{Code, Problem};
pub use watermarks::{SourceWatermarks, TargetWatermarks, WatermarkError};
