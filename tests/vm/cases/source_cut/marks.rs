//! What the state on the source's disk says may differ, and what does.

use std::path::Path;

use farshore::nbd_client::NbdClient;
use farshore_blkfilter::core::RegionMap;
use farshore_blkfilter::volume_state::{FileMedium, Found, Left, StateFile, Stored};
use farshore_extent::Lsn;
use farshore_protocol::admin::ReplicaStatus;

/// Marked regions of a volume.
pub struct Marks {
    pub name: String,
    pub set: RegionMap,
    /// What is not marked is with a target that has everything up to here.
    pub released: Lsn,
}

impl Marks {
    /// From a copy of the files that filterd left.
    pub fn read(folder: &Path, replica: &ReplicaStatus) -> Result<Self, String> {
        let id = replica.volume;
        let name = replica.name.to_string();
        let left = match StateFile::new(FileMedium::new(folder, &id.to_string())).load(id) {
            Found::Stored(Stored { left, .. }) => left,
            other => return Err(format!("{name}: its state cannot be read: {other:?}")),
        };
        match left {
            Left::Regions { set, released, damaged: 0 } => Ok(Self { name, set, released }),
            Left::Ranges { ranges, released } => {
                let mut set = RegionMap::new(replica.size, RegionMap::DEFAULT_REGION);
                for range in &ranges {
                    set.touched(*range).for_each(|region| {
                        set.set(region);
                    });
                }
                Ok(Self { name, set, released })
            }
            other => Err(format!("{name}: the map does not tell regions apart: {other:?}")),
        }
    }

    pub fn bytes(&self) -> u64 {
        self.set.iter().filter_map(|region| self.set.extent(region)).map(|e| e.len()).sum()
    }
}

/// The regions in which two exports differ; `regions` tells where they lie.
pub fn differing(a: &mut NbdClient, b: &mut NbdClient, regions: &RegionMap) -> Vec<u64> {
    const STEP: usize = 1 << 20;
    let mut bytes = [vec![0; STEP], vec![0; STEP]];
    let mut differs = |region: &u64| {
        let extent = regions.extent(*region).expect("a region");
        (extent.offset()..extent.end()).step_by(STEP).any(|offset| {
            a.read_at(offset, &mut bytes[0]).expect("the disk answers");
            b.read_at(offset, &mut bytes[1]).expect("the view answers");
            bytes[0] != bytes[1]
        })
    };
    (0..regions.regions()).filter(|region| differs(region)).collect()
}
