//! A seed: an image of a disk that was carried to this host, as the beginning of a replica.
//!
//! It waits in `seeds/HOST/NAME.img` until the host opens a new volume of that name, and becomes
//! the base of its replica. It is trusted in nothing: no point exists before the source has had
//! every chunk compared or sent, and an image of another size is not used.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use farshore_extent::{Problem, SECTOR, VolumeName, VolumeSize};
use farshore_protocol::paths::Paths;

use crate::config::{Config, DataDir};
use crate::store::SEED;
use crate::{durable_fs, problem};

/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// What is left out when it is all zeroes.
const PAGE: usize = 4096;

/// What [`seed`] has done, or would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedReport {
    /// Where the image waits.
    pub file: PathBuf,
    /// Size of the image in bytes: the volume has to have the same.
    pub bytes: u64,
}

/// Copies `image`, a raw image file or a block device, to where the first replica of volume `name`
/// of host `host` will find it. An earlier one is replaced. `dry_run`: only looks whether it could.
/// `tell` is called with the bytes done after each step.
///
/// # Errors
/// FS-6531 when the image cannot be used; FS-6501, FS-6502, FS-11xx.
pub fn seed(
    paths: &Paths,
    (host, name): (&VolumeName, &VolumeName),
    image: &Path,
    dry_run: bool,
    mut tell: impl FnMut(u64),
) -> Result<SeedReport, Problem> {
    let data = Config::load(paths)?.data_dir(paths);
    let bad = |why: String| problem::bad_seed(image, &why);
    let from = File::open(image).map_err(|e| bad(e.to_string()))?;
    let bytes = size(&from).map_err(bad)?;
    let file = place(&data, host, name);
    if dry_run {
        return Ok(SeedReport { file, bytes });
    }
    let dir = data.seeds().join(host.as_str());
    let failed = |e: io::Error| problem::file("write", &file, &e);
    durable_fs::create_private_dir(&dir).map_err(failed)?;
    // Written aside: what has the name is whole.
    let aside = dir.join(format!(".{name}.new"));
    let written = copy(&from, &aside, bytes, &mut tell)
        .and_then(|()| own_like(data.path(), &[&data.seeds(), &dir, &aside]))
        .and_then(|()| durable_fs::rename(&aside, &file));
    if let Err(error) = written {
        let _ = std::fs::remove_file(&aside); // the first error is the one to tell
        return Err(failed(error));
    }
    Ok(SeedReport { file, bytes })
}

fn size(image: &File) -> Result<u64, String> {
    let meta = image.metadata().map_err(|e| e.to_string())?;
    let kind = meta.file_type();
    let bytes = if kind.is_block_device() {
        let mut end = image;
        io::Seek::seek(&mut end, io::SeekFrom::End(0)).map_err(|e| e.to_string())?
    } else if kind.is_file() {
        meta.len()
    } else {
        return Err("it is neither a raw image file nor a block device".to_owned());
    };
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) || VolumeSize::new(bytes).is_err() {
        return Err(format!("it has {bytes} bytes; a volume has a multiple of {SECTOR}"));
    }
    Ok(bytes)
}

/// Zeroes become holes.
fn copy(from: &File, to: &Path, bytes: u64, tell: &mut impl FnMut(u64)) -> io::Result<()> {
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let out = durable_fs::create_private(to)?;
    out.set_len(bytes)?;
    let mut from = from;
    io::Seek::seek(&mut from, io::SeekFrom::Start(0))?;
    let mut reader = from.take(bytes);
    let (mut buf, mut at) = (vec![0; STEP], 0);
    while at < bytes {
        let len = usize::try_from(bytes - at).map_or(STEP, |left| left.min(STEP));
        let part = &mut buf[..len];
        reader.read_exact(part)?;
        for page in part.chunks(PAGE) {
            if page.iter().any(|byte| *byte != 0) {
                out.write_all_at(page, at)?;
            }
            at += page.len() as u64;
        }
        tell(at);
    }
    out.sync_all()
}

/// The daemon may run as another user than the person who types.
fn own_like(model: &Path, made: &[&Path]) -> io::Result<()> {
    let meta = std::fs::metadata(model)?;
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    made.iter().try_for_each(|path| chown(path, Some(meta.uid()), Some(meta.gid())))
}

fn place(data: &DataDir, host: &VolumeName, name: &VolumeName) -> PathBuf {
    data.seeds().join(host.as_str()).join(format!("{name}.img"))
}

/// Gives the replica in `dir`, which is not there yet, the seed that waits for it. Returns its
/// bytes; none when none waits.
///
/// # Errors
/// FS-6532: it has another size than the volume; it stays where it is. FS-6502.
pub(crate) fn take(
    data: &DataDir,
    (host, name): (&str, &VolumeName),
    size: VolumeSize,
    dir: &Path,
) -> Result<Option<u64>, Problem> {
    let Ok(host) = VolumeName::new(host) else { return Ok(None) };
    let file = place(data, &host, name);
    let failed = |e: io::Error| problem::file("use", &file, &e);
    let bytes = match std::fs::metadata(&file) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    if bytes != size.get() {
        return Err(problem::seed_of_another_size(name, &file, bytes, size));
    }
    durable_fs::create_private_dir(dir)
        .and_then(|()| durable_fs::rename(&file, &dir.join(SEED)))
        .map_err(failed)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{InitOptions, init};

    fn name(text: &str) -> VolumeName {
        VolumeName::new(text).unwrap()
    }

    fn target() -> (tempfile::TempDir, Paths, DataDir) {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        init(&paths, &InitOptions::default()).unwrap();
        let data = Config::load(&paths).unwrap().data_dir(&paths);
        (root, paths, data)
    }

    #[test]
    fn a_seed_waits_for_its_host_and_volume_and_is_used_once() {
        let (root, paths, data) = target();
        let image = root.path().join("disk.img");
        let mut bytes = vec![0; 3 << 20];
        bytes[1 << 20..(1 << 20) + 9000].fill(7);
        std::fs::write(&image, &bytes).unwrap();
        let (host, disk) = (name("db1"), name("pgdata"));
        let looked = seed(&paths, (&host, &disk), &image, true, |_| {}).unwrap();
        assert!(!looked.file.exists(), "a dry run makes nothing");
        let mut told = 0;
        let made = seed(&paths, (&host, &disk), &image, false, |at| told = at).unwrap();
        assert_eq!((made.bytes, told), (3 << 20, 3 << 20));
        assert_eq!(std::fs::read(&made.file).unwrap(), bytes);
        let allocated = std::fs::metadata(&made.file).unwrap().blocks() * 512;
        assert!(allocated < 1 << 20, "{allocated} bytes for 9000 that are not zero");

        let dir = data.volumes().join("x");
        let size = VolumeSize::new(3 << 20).unwrap();
        assert_eq!(take(&data, ("other", &disk), size, &dir), Ok(None));
        assert_eq!(take(&data, ("db1", &name("other")), size, &dir), Ok(None));
        assert_eq!(take(&data, ("db1", &disk), size, &dir), Ok(Some(3 << 20)));
        assert_eq!(std::fs::read(dir.join(SEED)).unwrap(), bytes);
        assert_eq!(take(&data, ("db1", &disk), size, &dir), Ok(None));
    }

    #[test]
    fn a_seed_of_another_size_is_not_used_and_stays() {
        let (root, paths, data) = target();
        let image = root.path().join("disk.img");
        std::fs::write(&image, vec![1; 1 << 20]).unwrap();
        let made = seed(&paths, (&name("h"), &name("v")), &image, false, |_| {}).unwrap();
        let size = VolumeSize::new(2 << 20).unwrap();
        let refused = take(&data, ("h", &name("v")), size, &data.volumes().join("x")).unwrap_err();
        assert_eq!(refused.code.0, 6532);
        assert!(made.file.exists());
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let (root, paths, _) = target();
        let odd = root.path().join("odd.img");
        std::fs::write(&odd, [1; 1000]).unwrap();
        let empty = root.path().join("empty.img");
        std::fs::write(&empty, []).unwrap();
        let missing = root.path().join("missing.img");
        for image in [odd.as_path(), &empty, &missing, root.path(), Path::new("/dev/null")] {
            let refused = seed(&paths, (&name("h"), &name("v")), image, false, |_| {}).unwrap_err();
            assert_eq!(refused.code.0, 6531, "{}", image.display());
        }
        let nowhere = Paths::under(&root.path().join("nowhere"));
        let refused = seed(&nowhere, (&name("h"), &name("v")), &odd, false, |_| {}).unwrap_err();
        assert_eq!(refused.code.0, 6501);
    }
}
