//! Operations by ordinary system calls, done before `push` returns.

use std::fs::File;
use std::os::unix::fs::FileExt;

use farshore_extent::Extent;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::op::{Op, ZERO_PIECE, zero_modes};
use crate::sys::aligned::AlignedBuf;

/// Does all of `op`.
pub(super) fn perform(file: &File, op: &mut Op) -> Result<(), Errno> {
    match op {
        Op::Read { offset, buf } => {
            file.read_exact_at(buf.bytes_mut(), *offset).map_err(|e| errno_of(&e))
        }
        Op::Write { offset, buf, durable } => {
            file.write_all_at(buf.bytes(), *offset).map_err(|e| errno_of(&e))?;
            if *durable { sync(file) } else { Ok(()) }
        }
        Op::Sync => sync(file),
        Op::Zero { extent, may_unmap, durable } => {
            zero(file, *extent, *may_unmap)?;
            if *durable { sync(file) } else { Ok(()) }
        }
    }
}

fn zero(file: &File, extent: Extent, may_unmap: bool) -> Result<(), Errno> {
    let [first, second] = zero_modes(may_unmap);
    match zero_by(file, extent, first) {
        Err(Errno::EOPNOTSUPP) => match zero_by(file, extent, second) {
            Err(Errno::EOPNOTSUPP) => write_zeroes(file, extent),
            other => other,
        },
        other => other,
    }
}

/// For file systems that can do neither.
fn write_zeroes(file: &File, extent: Extent) -> Result<(), Errno> {
    let zeroes = AlignedBuf::zeroed(ZERO_PIECE);
    let mut at = extent.offset();
    while at < extent.end() {
        let len = usize::try_from(extent.end() - at).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all_at(&zeroes[..len], at).map_err(|e| errno_of(&e))?;
        at += len as u64;
    }
    Ok(())
}

fn zero_by(file: &File, extent: Extent, mode: FallocateFlags) -> Result<(), Errno> {
    // An extent always fits a file position.
    let offset = i64::try_from(extent.offset()).map_err(|_| Errno::EINVAL)?;
    let len = i64::try_from(extent.len()).map_err(|_| Errno::EINVAL)?;
    loop {
        match fallocate(file, mode, offset, len) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

fn sync(file: &File) -> Result<(), Errno> {
    file.sync_data().map_err(|e| errno_of(&e))
}

/// The number of an I/O error; the standard library's own (unexpected end) count as EIO.
fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_written_where_the_kernel_cannot_zero() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; 600 << 10], 0).unwrap();
        write_zeroes(&file, Extent::new(4096, 590 << 10).unwrap()).unwrap();
        let mut bytes = vec![9; 600 << 10];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let end = 4096 + (590 << 10);
        assert!(bytes[4096..end].iter().all(|&b| b == 0));
        assert!(bytes[..4096].iter().chain(&bytes[end..]).all(|&b| b == 1));
    }
}
