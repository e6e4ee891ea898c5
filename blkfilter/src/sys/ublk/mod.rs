//! The edge to the ublk driver: what travels ([`uapi`]), control commands ([`control`]) and the
//! rings of queues ([`queue`]). No decision is made here.

pub mod control;
pub mod queue;
pub mod uapi;
