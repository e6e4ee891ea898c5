//! A device that gets larger between two requests of one group.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farshore_extent::{Extent, VolumeSize};

use super::client::{Client, exports, ram, served};
use crate::device::{Allocation, Device, DeviceError, DeviceInfo, Queue};
use crate::frontend::memory::MemoryDevice;
use crate::frontend::nbd::wire::{RawRequest, command};

const SMALL: u64 = 1 << 20;
const LARGE: u64 = 2 << 20;

/// Grows when it is asked where it has data.
struct Growing {
    ram: Arc<MemoryDevice>,
    size: AtomicU64,
}

impl Device for Growing {
    fn info(&self) -> DeviceInfo {
        let size = VolumeSize::new(self.size.load(Ordering::Relaxed)).unwrap();
        DeviceInfo { size, ..self.ram.info() }
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        self.ram.clone().open_queue()
    }

    fn allocation(&self, extent: Extent, max: usize) -> Vec<Allocation> {
        self.size.store(LARGE, Ordering::Relaxed);
        self.ram.allocation(extent, max)
    }
}

#[test]
fn a_request_for_the_new_part_is_taken_in_the_group_in_which_the_device_grew() {
    let device = Arc::new(Growing { ram: ram(LARGE), size: AtomicU64::new(SMALL) });
    let (stream, server) = served(&exports(device));
    let mut client = Client::enter(stream, true);
    let request = |command, cookie, offset| {
        RawRequest { flags: 0, command, cookie, offset, len: 4096 }.encode()
    };
    let both = [request(command::BLOCK_STATUS, 1, 0), request(command::READ, 2, SMALL)].concat();
    client.say(&both);
    let status = client.answer(|_| (0, 0));
    assert_eq!((status.cookie, status.error), (1, 0));
    let read = client.answer(|_| (SMALL, 4096));
    assert_eq!((read.cookie, read.error), (2, 0));
    client.leave(server);
}
