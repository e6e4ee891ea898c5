//! What is true: the content of a volume at every number, kept apart from everything under test.
//!
//! A sector's content is one identity: 0 is zero, everything else names the write that made it.

use std::collections::BTreeMap;

use farshore_extent::{Extent, Lsn, SECTOR};

/// Identity of a sector's content.
pub type Content = u64;

/// The bytes of a sector with this content. Zero is all zero.
pub fn sector_bytes(content: Content) -> [u8; 512] {
    let mut bytes = [0; 512];
    for (at, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = if content == 0 { [0; 8] } else { (content ^ ((at as u64) << 48)).to_le_bytes() };
    }
    bytes
}

/// The content of a sector's bytes; `None` when they are a mix that no write made.
pub fn content_of(bytes: &[u8]) -> Option<Content> {
    let first = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    (sector_bytes(first) == bytes).then_some(first)
}

/// The sectors of an extent.
pub fn sectors(extent: Extent) -> std::ops::Range<usize> {
    let sector = |at: u64| usize::try_from(at / SECTOR).expect("tiny volumes");
    sector(extent.offset())..sector(extent.end())
}

#[derive(Debug, Clone)]
enum Change {
    /// These sectors have this content from here on.
    Set(std::ops::Range<usize>, Vec<Content>),
    /// The volume is larger from here on, by this content.
    Append(Vec<Content>),
    /// Everything is as here: after a crash of the source.
    Image(Vec<Content>),
}

/// One volume's history.
#[derive(Debug, Clone)]
pub struct Oracle {
    now: Vec<Content>,
    history: BTreeMap<Lsn, Vec<Change>>,
}

impl Oracle {
    pub fn new(image: Vec<Content>) -> Self {
        let history = BTreeMap::from([(Lsn::ZERO, vec![Change::Image(image.clone())])]);
        Self { now: image, history }
    }

    /// From `lsn` on the extent has this content.
    pub fn set(&mut self, lsn: Lsn, extent: Extent, content: Vec<Content>) {
        let range = sectors(extent);
        self.now[range.clone()].copy_from_slice(&content);
        self.history.entry(lsn).or_default().push(Change::Set(range, content));
    }

    /// From `lsn` on the volume has this content behind its old end.
    pub fn append(&mut self, lsn: Lsn, content: Vec<Content>) {
        self.now.extend_from_slice(&content);
        self.history.entry(lsn).or_default().push(Change::Append(content));
    }

    /// From `lsn` on the volume is as this image.
    pub fn replace(&mut self, lsn: Lsn, image: Vec<Content>) {
        self.now.clone_from(&image);
        self.history.entry(lsn).or_default().push(Change::Image(image));
    }

    /// The content now.
    pub fn now(&self) -> &[Content] {
        &self.now
    }

    /// The content when everything up to `lsn` had happened and nothing else.
    pub fn at(&self, lsn: Lsn) -> Vec<Content> {
        let mut image = Vec::new();
        for change in self.history.range(..=lsn).flat_map(|(_, changes)| changes) {
            match change {
                Change::Set(range, content) => image[range.clone()].copy_from_slice(content),
                Change::Append(content) => image.extend_from_slice(content),
                Change::Image(all) => image.clone_from(all),
            }
        }
        image
    }
}
