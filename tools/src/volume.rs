//! `farshore volume`: changes to a protected volume in use.

use clap::Subcommand;
use farshore_extent::VolumeName;

use crate::args::{Global, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::rpc;
use crate::{ask, units};

/// Version of the document.
const SCHEMA: &str = "farshore.volume/1";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Take over the larger size that its disk or image file has got, while it is in use
    Grow {
        /// Which volume
        #[arg(value_parser = volume_name)]
        name: VolumeName,
    },
    /// Let a volume that was failed over be written here again, when its target is lost for good
    Unfence {
        /// Which volume
        #[arg(value_parser = volume_name)]
        name: VolumeName,
    },
}

/// `farshore volume`.
pub fn run(command: &VolumeCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    match command {
        VolumeCommand::Grow { name } => grow(name, global, out),
        VolumeCommand::Unfence { name } => unfence(name, global, out),
    }
}

fn unfence(name: &VolumeName, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let mut filterd = rpc::filterd(&global.paths())?;
    let found = filterd.list()?.into_iter().find(|v| v.info.name == *name);
    let Some(fence) = found.as_ref().and_then(|v| v.fenced.clone()) else {
        out.line(format!("{name} is not fenced on this host"));
        return Ok(Exit::Ok);
    };
    out.line(format!("{name} was fenced by its target: {}", fence.what));
    if global.dry_run {
        out.line("would let it be written here again; a target that is alive fences it again");
        return Ok(Exit::Ok);
    }
    let question = format!(
        "Is nobody using {name} on the target, now or later? Two writers cannot be put together again"
    );
    ask::confirm(&question, global)?;
    if let Some(volume) = found {
        filterd.fence(volume.info.volume, None)?;
    }
    out.line(format!("{name} takes writes here again as soon as nobody has it open read-only"));
    Ok(Exit::Ok)
}

fn grow(name: &VolumeName, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let grown = rpc::filterd(&global.paths())?.grow(name.clone(), global.dry_run)?;
    if out.json {
        out.document(SCHEMA, if global.dry_run { "would_grow" } else { "grown" }, &grown);
        return Ok(Exit::Ok);
    }
    let (from, to) = (units::bytes(grown.from.get()), units::bytes(grown.to.get()));
    if grown.from == grown.to {
        out.line(format!("{name} has all of its disk already: {to}"));
    } else if global.dry_run {
        out.line(format!("ready: {name} can grow from {from} to {to}; nothing was changed"));
    } else {
        out.line(format!("{name} has grown from {from} to {to}"));
        out.hint(
            "a new part that is not empty is copied before points are cut again: farshore status",
        );
        out.hint("enlarge what is on it now: resize2fs, xfs_growfs, btrfs filesystem resize");
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use farshore_blkfilter::control::Grown;
    use farshore_extent::{VolumeId, VolumeSize};

    use super::*;

    #[test]
    fn a_grown_volume_as_json_is_a_contract() {
        let grown = Grown {
            volume: VolumeId::from_bytes([7; 16]),
            name: VolumeName::new("pgdata").unwrap(),
            from: VolumeSize::new(16 << 20).unwrap(),
            to: VolumeSize::new(24 << 20).unwrap(),
        };
        let document = crate::output::document(SCHEMA, "grown", &grown);
        crate::status::golden::same("volume.json", &document);
    }
}
