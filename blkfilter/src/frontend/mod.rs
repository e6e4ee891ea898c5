//! Front ends: the only places that know a kernel or client protocol. They serve any
//! [`Device`](crate::device::Device): the filter on the source, views on the target.

mod claim;
pub mod kernel_nbd;
pub mod memory;
pub mod nbd;
pub mod ublk;
pub mod users;
