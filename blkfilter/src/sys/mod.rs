//! The edge to the kernel: the only unsafe code of the project.
//!
//! Owns mappings, rings and descriptors and nothing else: no decision about capture is made here.
//! Everything offered to the rest of the crate is safe; each unsafe block says why it is sound.
//! A buffer belongs to its operation from [`ring::Ring::push`] until its completion comes back.
#![allow(unsafe_code)]

pub mod aligned;
pub mod clock;
pub mod fdpass;
pub mod freeze;
pub mod info;
pub mod isolate;
pub mod netlink;
pub mod pool;
pub mod pool_reader;
pub mod process;
pub mod ring;
pub mod ublk;
pub mod wake;

/// Alignment of every buffer in bytes: enough for direct I/O on any device we accept.
pub const BUFFER_ALIGN: usize = 4096;

/// A temporary directory beside the test program: on a disk, unlike perhaps `/tmp`.
#[cfg(test)]
pub(crate) fn disk_dir() -> tempfile::TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}
