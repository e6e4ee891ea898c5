//! What an agent and a target do together, in memory: records are fetched, checked and applied.

use std::path::Path;
use std::time::Duration;

use farshore_blkfilter::control::{
    Client, CompareAnswer, Descriptor, DescriptorBody, FetchWish, PoolPlace,
};
use farshore_blkfilter::sys::pool_reader::ReadOnlyPool;
use farshore_extent::{Extent, Lsn, MarkerId, VolumeId};

/// A replica in memory.
pub struct Consumer {
    client: Client,
    pool: ReadOnlyPool,
    volume: VolumeId,
    pub image: Vec<u8>,
    pub after: Lsn,
    pub ordered: bool,
    /// `continues` of each epoch's start, in order.
    pub starts: Vec<bool>,
    pub lost: u32,
    pub restored: u32,
    /// The image at each marker.
    pub points: Vec<(MarkerId, Vec<u8>)>,
    pub copied_bytes: u64,
    /// Extents whose digests differed, not said yet.
    differing: Vec<Extent>,
}

impl Consumer {
    pub fn new(socket: &Path, volume: VolumeId, size: usize) -> Self {
        let mut client = Client::connect(socket).unwrap();
        let pool = client.open_pool(volume).unwrap();
        Self {
            client,
            pool,
            volume,
            image: vec![0xEE; size],
            after: Lsn::ZERO,
            ordered: false,
            starts: vec![],
            lost: 0,
            restored: 0,
            points: vec![],
            copied_bytes: 0,
            differing: vec![],
        }
    }

    /// The daemon was restarted: the replica stays.
    pub fn reconnect(&mut self, socket: &Path) {
        self.client = Client::connect(socket).unwrap();
        self.pool = self.client.open_pool(self.volume).unwrap();
    }

    /// Fetches once, applies, and releases if `release`. Returns how many records came.
    pub fn pull(&mut self, release: bool) -> usize {
        let wish = FetchWish {
            want_bytes: 1 << 20,
            wait: Duration::from_millis(20),
            idle: Duration::from_millis(100),
        };
        let fetched = self.client.fetch(self.volume, self.after, wish).unwrap();
        for record in &fetched.records {
            let lsn = Lsn::new(fetched.epoch, record.seq);
            assert!(lsn > self.after, "numbers go up: {lsn} after {}", self.after);
            self.after = lsn;
            self.apply(record);
        }
        if release && !fetched.records.is_empty() {
            self.client.release(self.volume, self.after).unwrap();
            let answer = CompareAnswer::Differing(std::mem::take(&mut self.differing));
            self.client.compared(self.volume, self.after, answer).unwrap();
        }
        fetched.records.len()
    }

    /// Releases everything pulled, of a daemon that may end before it can answer.
    pub fn release_last(&mut self) {
        drop(self.client.release(self.volume, self.after));
    }

    fn apply(&mut self, record: &Descriptor) {
        match &record.body {
            DescriptorBody::Write { extent, place } => self.data(*extent, *place),
            DescriptorBody::Copy { extent, place } => {
                self.copied_bytes += extent.len();
                self.data(*extent, *place);
            }
            DescriptorBody::Zero { extent, .. } => self.range(*extent).fill(0),
            DescriptorBody::OrderLost => {
                self.ordered = false;
                self.lost += 1;
            }
            DescriptorBody::OrderRestored => {
                self.ordered = true;
                self.restored += 1;
            }
            DescriptorBody::EpochStart { continues, .. } => {
                self.ordered &= *continues;
                self.starts.push(*continues);
            }
            DescriptorBody::Marker { marker, .. } => {
                assert!(self.ordered, "a marker outside of an ordered stretch");
                self.points.push((*marker, self.image.clone()));
            }
            DescriptorBody::Hash { extent, digest, .. } => {
                if blake3::hash(self.range(*extent)) != *digest {
                    self.differing.push(*extent);
                }
            }
            DescriptorBody::Unknown { .. }
            | DescriptorBody::MarkerCommit(_)
            | DescriptorBody::MarkerAbort(_)
            | DescriptorBody::Resize(_) => {}
        }
    }

    fn range(&mut self, extent: Extent) -> &mut [u8] {
        let at = |byte: u64| usize::try_from(byte).unwrap();
        &mut self.image[at(extent.offset())..at(extent.end())]
    }

    fn data(&mut self, extent: Extent, place: PoolPlace) {
        let bytes = self.pool.bytes(place.offset, extent.len()).expect("a place in the pool");
        assert_eq!(crc32c::crc32c(bytes), place.crc, "payload of {extent}");
        let bytes = bytes.to_vec();
        self.range(extent).copy_from_slice(&bytes);
    }

    /// Pulls and releases until the volume is ordered and nothing is left.
    pub fn drain(&mut self) {
        for _ in 0..2000 {
            let none = self.pull(true) == 0;
            if none && self.ordered && self.client.drain(self.volume, Duration::ZERO).unwrap() {
                return;
            }
        }
        panic!("the volume does not come to rest; ordered: {}", self.ordered);
    }
}
