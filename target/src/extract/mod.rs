//! `farshore extract`: a point out of a store's folder into an image file or onto a block device,
//! without daemons, catalogue or network. Needs the folder, and nothing else of this host.

mod destination;
mod problem;

use std::path::{Path, PathBuf};

use farshore_extent::{ExtentSet, Lsn, Problem, WallTime};

use crate::store::{
    CheckReport, CommittedPoint, CopyError, OfflineStore, PointReader, check, copy_out,
};
pub use destination::Destination;

/// Which moment is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The newest point.
    Newest,
    /// The newest application-consistent point.
    NewestApp,
    /// The oldest point.
    Oldest,
    /// The newest point of this name.
    Name(String),
    /// A place in the change log.
    At(Lsn),
    /// The last place captured at or before this time.
    Time(WallTime),
}

/// A moment that can be read.
pub struct Chosen {
    /// The moment.
    pub at: Lsn,
    /// When it was.
    pub time: WallTime,
    /// The point that lies there, if there is one.
    pub point: Option<CommittedPoint>,
    reader: PointReader,
}

impl Chosen {
    /// Size of the volume then, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.reader.size().get()
    }
}

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Fill what cannot be read with zeroes instead of giving up.
    pub zero_damaged: bool,
    /// Read the destination again and compare.
    pub read_back: bool,
}

/// What was extracted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extracted {
    /// Size of the image in bytes.
    pub bytes: u64,
    /// Of these were not zero.
    pub data_bytes: u64,
    /// BLAKE3 of the image, in hexadecimal.
    pub digest: String,
    /// Ranges that could not be read and are zero now.
    pub unreadable: ExtentSet,
    /// Why, for the first of them.
    pub reasons: Vec<String>,
}

/// Opens the store in `dir` for reading; it stays unchanged, and no daemon can open it meanwhile.
///
/// # Errors
/// FS-6701 while a daemon has it; FS-6002, FS-6004 to FS-6006.
pub fn open(dir: &Path) -> Result<OfflineStore, Problem> {
    OfflineStore::open(dir).map_err(|e| problem::store(dir, &e))
}

/// Verifies the whole store in `dir`; see [`crate::store::check`].
///
/// # Errors
/// As for [`open`].
pub fn check_store(dir: &Path, tell: &mut dyn FnMut(u64, u64)) -> Result<CheckReport, Problem> {
    check(dir, tell).map_err(|e| problem::store(dir, &e))
}

/// Finds the wanted moment.
///
/// # Errors
/// FS-6702 when the journal has no such point; FS-6010 to FS-6012 when the moment cannot be opened.
pub fn choose(store: &OfflineStore, dir: &Path, wanted: &Wanted) -> Result<Chosen, Problem> {
    let points = store.points();
    let newest = |is: &dyn Fn(&CommittedPoint) -> bool| points.iter().rev().find(|p| is(p));
    let point = match wanted {
        Wanted::Newest => newest(&|_| true),
        Wanted::NewestApp => newest(&|p| p.kind == farshore_extent::PointKind::App),
        Wanted::Oldest => points.first(),
        Wanted::Name(name) => newest(&|p| p.name == *name),
        Wanted::At(_) | Wanted::Time(_) => None,
    };
    let failed = |e| problem::store(dir, &e);
    let at = match (wanted, point) {
        (Wanted::At(at), _) => *at,
        (Wanted::Time(time), _) => store
            .resolve_time(*time)
            .map_err(failed)?
            .ok_or_else(|| problem::no_point(dir, "the journal begins after this time"))?,
        (_, Some(point)) => point.lsn,
        (Wanted::Name(name), None) => {
            return Err(problem::no_point(dir, &format!("no point has the name \"{name}\"")));
        }
        (_, None) => return Err(problem::no_point(dir, "the journal has no such point")),
    };
    let reader = store.open_view(at).map_err(|e| problem::view(dir, &e))?;
    let time = match point {
        Some(point) => point.time,
        None => store.time_at(at).map_err(failed)?,
    };
    let point = points.iter().find(|p| p.lsn == at);
    Ok(Chosen { at, time, point: point.cloned(), reader })
}

/// Copies the moment to its destination, durably. `tell` hears how many bytes are done and says
/// whether to go on. A file gets its name only when it is whole.
///
/// # Errors
/// FS-6705 when the destination fails; FS-6706 when a part of the moment cannot be read (unless
/// `zero_damaged`); FS-6707 when it was read back differently; FS-6708 when `tell` ended it.
pub fn extract(
    chosen: &Chosen,
    destination: Destination,
    options: Options,
    tell: impl FnMut(u64) -> bool,
) -> Result<Extracted, Problem> {
    let to: PathBuf = destination.path().to_owned();
    let failed = |e: std::io::Error| problem::cannot_write(&to, &e);
    let mut image = destination.begin(chosen.bytes()).map_err(failed)?;
    let copied = copy_out(&chosen.reader, image.as_mut(), tell).map_err(|e| match e {
        CopyError::Sink { source, .. } => failed(source),
        CopyError::Stopped => problem::stopped(&to),
    })?;
    if !copied.unreadable.is_empty() && !options.zero_damaged {
        return Err(problem::unreadable(&to, &copied.unreadable, &copied.reasons, image.is_file()));
    }
    image.sync().map_err(failed)?;
    if options.read_back && image.digest(copied.bytes).map_err(failed)? != copied.digest {
        return Err(problem::differs(&to));
    }
    image.finish().map_err(failed)?;
    Ok(Extracted {
        bytes: copied.bytes,
        data_bytes: copied.data_bytes,
        digest: copied.digest.to_hex().to_string(),
        unreadable: copied.unreadable,
        reasons: copied.reasons,
    })
}
