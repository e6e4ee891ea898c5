//! A point copied out of the store, from the first byte to the last: what cannot be read is
//! found and named on the way, and never taken for content.

use std::io;

use farshore_extent::{Extent, ExtentSet};

use super::error::ReadError;
use super::view::{Content, PointReader};

/// Looked at together, in bytes.
const WINDOW: u64 = 64 << 20;

/// Read at once, in bytes.
const PIECE: u64 = 1 << 20;

/// What is zero in units of this many bytes is not written.
const PAGE: u64 = 4096;

/// Pieces of a window that may be looked at together.
const MAX_PIECES: usize = 1 << 16;

/// Reasons kept for what cannot be read.
const MAX_REASONS: usize = 8;

/// Where the content of a point goes, by address, every byte of it once.
pub trait ImageSink {
    /// Takes bytes.
    ///
    /// # Errors
    /// Of the medium.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Takes zeroes.
    ///
    /// # Errors
    /// Of the medium.
    fn zero(&mut self, extent: Extent) -> io::Result<()>;
}

/// What was copied.
#[derive(Debug, Clone)]
pub struct Copied {
    /// Size of the image in bytes.
    pub bytes: u64,
    /// Of these were not zero.
    pub data_bytes: u64,
    /// BLAKE3 of the image.
    pub digest: blake3::Hash,
    /// Ranges that could not be read, given out as zeroes.
    pub unreadable: ExtentSet,
    /// Why, for the first of them.
    pub reasons: Vec<String>,
}

/// A copy ended early.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The destination failed.
    #[error("writing at {at}: {source}")]
    Sink {
        /// Offset in the image.
        at: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Whoever asked for it stopped it.
    #[error("stopped")]
    Stopped,
}

/// Gives every byte of the point to `sink`. `tell` hears how many bytes are done and says whether
/// to go on.
///
/// # Errors
/// [`CopyError`]. What cannot be read is none: see [`Copied::unreadable`].
pub fn copy_out(
    reader: &PointReader,
    sink: &mut dyn ImageSink,
    mut tell: impl FnMut(u64) -> bool,
) -> Result<Copied, CopyError> {
    let mut copy = Copying { reader, sink, hasher: blake3::Hasher::new(), done: Done::default() };
    for window in reader.size().extent().split_at_multiples_of(WINDOW) {
        copy.window(window, &mut tell)?;
    }
    Ok(Copied {
        bytes: reader.size().get(),
        data_bytes: copy.done.data_bytes,
        digest: copy.hasher.finalize(),
        unreadable: copy.done.unreadable,
        reasons: copy.done.reasons,
    })
}

#[derive(Default)]
struct Done {
    data_bytes: u64,
    unreadable: ExtentSet,
    reasons: Vec<String>,
}

struct Copying<'a> {
    reader: &'a PointReader,
    sink: &'a mut dyn ImageSink,
    hasher: blake3::Hasher,
    done: Done,
}

impl Copying<'_> {
    fn window(
        &mut self,
        window: Extent,
        tell: &mut impl FnMut(u64) -> bool,
    ) -> Result<(), CopyError> {
        let mut at = window.offset();
        while let Some(rest) = Extent::between(at, window.end()) {
            // An index that cannot be read costs no more than the piece that needs it.
            let piece = Extent::between(at, window.end().min(at + PIECE)).unwrap_or(rest);
            let found = self.reader.contents(rest, MAX_PIECES);
            let found = found.or_else(|_| self.reader.contents(piece, MAX_PIECES));
            // Nothing said about a range is no reason to leave it out.
            let found = found.and_then(|pieces| match pieces.is_empty() {
                true => Err(ReadError::Outside { extent: piece }),
                false => Ok(pieces),
            });
            match found {
                Ok(pieces) => {
                    for (extent, content) in pieces {
                        self.content(extent, content, tell)?;
                        at = extent.end();
                    }
                }
                Err(why) => {
                    self.unreadable(piece, &why);
                    self.zero(piece)?;
                    at = piece.end();
                }
            }
            go_on(tell, at)?;
        }
        Ok(())
    }

    fn content(
        &mut self,
        extent: Extent,
        content: Content,
        tell: &mut impl FnMut(u64) -> bool,
    ) -> Result<(), CopyError> {
        match content {
            Content::Zero => return self.zero(extent),
            Content::Unknown => {
                self.unreadable(extent, &ReadError::Unknown { extent });
                return self.zero(extent);
            }
            Content::Data => {}
        }
        for piece in extent.split_at_multiples_of(PIECE) {
            let mut bytes = vec![0; usize::try_from(piece.len()).unwrap_or(0)];
            self.read(&mut bytes, piece);
            self.data(&bytes, piece.offset())?;
            go_on(tell, piece.end())?;
        }
        Ok(())
    }

    /// Fills `bytes`; what cannot be read stays zero and is remembered.
    fn read(&mut self, bytes: &mut [u8], piece: Extent) {
        let mut rest = Some(piece);
        while let Some(here) = rest {
            let from = usize::try_from(here.offset() - piece.offset()).unwrap_or(0);
            let Err(why) = self.reader.read_at(&mut bytes[from..], here.offset()) else { return };
            let bad = match &why {
                ReadError::Damaged { extent, .. }
                | ReadError::Base { extent }
                | ReadError::Unknown { extent } => *extent,
                // A page of an index or of the base: find out which part of this needs it.
                ReadError::Outside { .. } | ReadError::Store(_) => {
                    return self.read_parts(&mut bytes[from..], here);
                }
            };
            if let Some(good) = Extent::between(here.offset(), bad.offset()) {
                let to = from + usize::try_from(good.len()).unwrap_or(0);
                self.read(&mut bytes[from..to], good);
            }
            rest = Extent::between(bad.end(), piece.end());
            let to = rest.map_or(bytes.len(), |r| {
                usize::try_from(r.offset() - piece.offset()).unwrap_or(bytes.len())
            });
            let bad_from = usize::try_from(bad.offset() - piece.offset()).unwrap_or(0);
            bytes[bad_from..to].fill(0);
            self.unreadable(bad, &why);
        }
    }

    fn read_parts(&mut self, bytes: &mut [u8], extent: Extent) {
        for part in extent.split_at_multiples_of(PAGE) {
            let from = usize::try_from(part.offset() - extent.offset()).unwrap_or(0);
            let out = &mut bytes[from..][..usize::try_from(part.len()).unwrap_or(0)];
            if let Err(why) = self.reader.read_at(out, part.offset()) {
                out.fill(0);
                self.unreadable(part, &why);
            }
        }
    }

    fn unreadable(&mut self, extent: Extent, why: &ReadError) {
        if self.done.reasons.len() < MAX_REASONS {
            self.done.reasons.push(why.to_string());
        }
        self.done.unreadable.insert(extent);
    }

    /// Writes what is not zero.
    fn data(&mut self, bytes: &[u8], offset: u64) -> Result<(), CopyError> {
        self.hasher.update(bytes);
        let Some(whole) = Extent::between(offset, offset + bytes.len() as u64) else {
            return Ok(());
        };
        let part = |extent: Extent| {
            let from = usize::try_from(extent.offset() - offset).unwrap_or(0);
            &bytes[from..][..usize::try_from(extent.len()).unwrap_or(0)]
        };
        let mut runs: Vec<(Extent, bool)> = Vec::new();
        for page in whole.split_at_multiples_of(PAGE) {
            let zero = part(page).iter().all(|byte| *byte == 0);
            match runs.last_mut() {
                Some((run, kind)) if *kind == zero => {
                    *run = Extent::between(run.offset(), page.end()).unwrap_or(page);
                }
                _ => runs.push((page, zero)),
            }
        }
        for (run, zero) in runs {
            let written = if zero {
                self.sink.zero(run)
            } else {
                self.done.data_bytes += run.len();
                self.sink.write(run.offset(), part(run))
            };
            written.map_err(|source| CopyError::Sink { at: run.offset(), source })?;
        }
        Ok(())
    }

    fn zero(&mut self, extent: Extent) -> Result<(), CopyError> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        for piece in extent.split_at_multiples_of(ZEROES.len() as u64) {
            self.hasher.update(&ZEROES[..usize::try_from(piece.len()).unwrap_or(0)]);
        }
        let at = extent.offset();
        self.sink.zero(extent).map_err(|source| CopyError::Sink { at, source })
    }
}

fn go_on(tell: &mut impl FnMut(u64) -> bool, at: u64) -> Result<(), CopyError> {
    if tell(at) { Ok(()) } else { Err(CopyError::Stopped) }
}
