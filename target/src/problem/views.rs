//! What a person is told of views that are open, and of making one an image: FS-6610 to FS-6624.

use std::fmt::Display;
use std::path::Path;

use farshore_extent::{Problem, ViewId};

/// FS-6610: a view that is open cannot be served now.
#[must_use]
pub fn view_not_served(view: &str, scratch: &Path, why: &Problem) -> Problem {
    Problem::harmless(
        6610,
        format!("{view} is open and not served"),
        format!("{}: {}", why.what, why.why),
        format!(
            "{}; it is tried again every 10 seconds. farshore failover cleanup gives it up, with \
             its writes",
            why.next
        ),
    )
    .with_risk(format!(
        "its clients cannot read or write; what was written to it stays in {}",
        scratch.display()
    ))
}

/// Why a view is not served just after a start; FS-6610 tells it.
#[must_use]
pub fn view_being_opened() -> Problem {
    Problem::harmless(
        6610,
        "the daemon has just started",
        "the view is being opened again",
        "wait a moment",
    )
}

/// Why a view is not served; FS-6610 tells it.
#[must_use]
pub fn bad_scratch(scratch: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        6610,
        format!("its scratch {} cannot be used", scratch.display()),
        why.to_string(),
        "check the disk under it, and bring the files back from a copy if there is one",
    )
}

/// FS-6611: a scratch of a view that the catalogue does not know.
#[must_use]
pub fn stray_scratch(scratch: &Path) -> Problem {
    Problem::harmless(
        6611,
        format!("{} is the scratch of a view that nobody knows; it is kept", scratch.display()),
        "the catalogue is older than this view, or the volume is gone",
        "bring the newer catalogue back, or remove the folder when its writes are not needed",
    )
}

/// FS-6613: a sync of a view's scratch has failed.
#[must_use]
pub fn scratch_failed(view: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        6613,
        format!("{view} takes no more writes: its scratch could not be made durable"),
        why.to_string(),
        "check the disk under the target's data and the kernel's log, then restart the target: the \
         view is served again as of its last good flush",
    )
    .with_risk("what was written to it since its last good flush may be lost; it can be read")
}

/// FS-6614: a view has not much room left.
#[must_use]
pub fn scratch_nearly_full(view: &str, used: u64, quota: u64) -> Problem {
    Problem::harmless(
        6614,
        format!("the scratch of {view} is nearly full"),
        format!("{used} of {quota} bytes are written to it"),
        "copy what you need, or flatten it: farshore failover flatten; or open the point again with \
         a larger --scratch",
    )
    .with_risk("when it is full its clients get \"no space\"; replication goes on")
}

/// FS-6615: a view has no room left.
#[must_use]
pub fn scratch_full(view: &str, quota: u64) -> Problem {
    Problem::harmless(
        6615,
        format!("the scratch of {view} is full"),
        format!("it may take {quota} bytes"),
        "copy what you need, or flatten it: farshore failover flatten; or open the point again with \
         a larger --scratch",
    )
    .with_risk("its clients get \"no space\" and can read; replication goes on")
}

/// FS-6616: the disk of the target has no room for views.
#[must_use]
pub fn no_room_for_views(view: &str) -> Problem {
    Problem::harmless(
        6616,
        format!("{view} takes no new writes: the disk of the target is nearly full"),
        "what is left is for the journals (limits.view_reserve in target.toml)",
        "free space on it, or close views: farshore failover cleanup",
    )
    .with_risk("its clients get \"no space\" and can read; replication goes on")
}

/// FS-6617: a view keeps much journal from expiring.
#[must_use]
pub fn view_holds_journal(view: &str, id: ViewId, bytes: u64) -> Problem {
    Problem::harmless(
        6617,
        format!("{view} keeps journal that has expired"),
        format!("{bytes} bytes cannot go while a view shows such an old point"),
        format!(
            "close it: farshore failover cleanup {id}; or make it independent of the journal: \
             farshore failover flatten {id} --to FILE"
        ),
    )
    .with_risk("the journal grows until the disk of the target is full")
}

/// Why a view is not served; FS-6610 tells it.
#[must_use]
pub fn bad_image(image: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        6610,
        format!("its image {} cannot be used", image.display()),
        why.to_string(),
        "mount or attach the disk that it lies on",
    )
}

/// FS-6620: a view that is flattened, or being flattened, already.
#[must_use]
pub fn already_flat(view: &str, running: bool) -> Problem {
    let (what, next) = match running {
        true => ("is being flattened", "wait, or stop it: farshore failover flatten --stop"),
        false => ("is flattened already", "farshore failover list shows its image"),
    };
    Problem::harmless(6620, format!("{view} {what}"), "that is done once", next)
}

/// FS-6620: nothing to stop.
#[must_use]
pub fn flatten_not_running(view: &str) -> Problem {
    let next = "farshore failover list shows what is under way";
    Problem::harmless(
        6620,
        format!("{view} is not being flattened"),
        "there is nothing to stop",
        next,
    )
}

/// FS-6620: a view that cannot be read now.
#[must_use]
pub fn flatten_not_served(view: &str) -> Problem {
    let next = "farshore failover list shows why; try again when it is served";
    Problem::harmless(6620, format!("{view} cannot be flattened"), "it is not served now", next)
}

/// FS-6621: something lies where the image is to go.
#[must_use]
pub fn flatten_not_empty(to: &Path) -> Problem {
    Problem::harmless(
        6621,
        format!("{} is not empty", to.display()),
        "what lies there would be lost",
        "choose another place, or add --force if nobody needs it",
    )
}

/// FS-6621: the daemon has another working directory than whoever asks.
#[must_use]
pub fn flatten_not_absolute(to: &Path) -> Problem {
    let why = "the target daemon has another working directory";
    Problem::harmless(6621, format!("{} is no absolute path", to.display()), why, "begin it with /")
}

/// FS-6621: a view cannot become what it is shown by.
#[must_use]
pub fn flatten_onto_view(to: &Path) -> Problem {
    let why = "it shows a view itself";
    let what = format!("{} cannot take an image", to.display());
    Problem::harmless(6621, what, why, "choose another file or device")
}

/// FS-6622: the image cannot be begun.
#[must_use]
pub fn flatten_cannot_write(to: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        6622,
        format!("{} cannot be written", to.display()),
        why.to_string(),
        "give it space or a healthy disk, and run the same command again",
    )
}

/// FS-6622 to FS-6624, and why it could not go on after a restart: a view is not flattened.
#[must_use]
pub fn flatten_failed(code: u16, view: &str, to: &Path, why: &str) -> Problem {
    let next = match code {
        6623 => "check the disk of the image and the kernel's log, and take another one",
        6624 => "choose another point; farshore scrub tells what of the store is damaged",
        _ => "mend that and run the same command again: it goes on with what is there",
    };
    Problem::harmless(code, format!("{view} is not flattened into {}", to.display()), why, next)
        .with_risk("the view is as it was and in use; it goes on to hold its point")
}
