use farshore_extent::{Generation, Lsn, ViewId, WallTime};
use farshore_protocol::failover::{FailoverPhase as Phase, JobKind};

use super::{Opening, Pair, Todo};

const NOW: WallTime = WallTime::from_nanos(7);

fn opening(n: u8) -> Opening {
    Opening {
        view: ViewId::from_bytes([n; 16]),
        lsn: Lsn::ZERO,
        time: NOW,
        point: None,
        device: false,
        tls_listen: None,
    }
}

fn generation(n: u64) -> Generation {
    Generation::new(n)
}

/// Every phase at rest or with its work, as the product can have it.
fn rows() -> Vec<Pair> {
    let source = Pair::new(generation(1));
    let fencing = source.fail_over(opening(1), NOW).unwrap().1;
    let opening_now = fencing.done(NOW);
    let pending = opening_now.done(NOW);
    let unopened = opening_now.failed(NOW);
    let changing = pending.fail_over(opening(2), NOW).unwrap().1;
    let cancelling = pending.cancel().unwrap().1;
    let (closed, closed_too) = (changing.done(NOW), cancelling.done(NOW));
    vec![source, fencing, opening_now, pending, unopened, changing, closed, cancelling, closed_too]
}

fn shown(pair: &Pair) -> String {
    let open = if pair.open.is_some() { " with a view" } else { "" };
    format!("{}{open}", pair.phase.as_str())
}

/// The table of the manual.
fn table() -> String {
    let mut lines = vec![
        "| where it is | sources | what is done | then | when that fails | `unplanned` | `cancel` |"
            .to_owned(),
        "|---|---|---|---|---|---|---|".to_owned(),
    ];
    for row in rows() {
        let sources = if row.fences() { "refused" } else { "taken" };
        let todo = row.todo();
        let (then, fails) = match todo {
            Todo::Rest => ("-".to_owned(), "-".to_owned()),
            _ => (shown(&row.done(NOW)), shown(&row.failed(NOW))),
        };
        // A job has the volume while there is something to do.
        let begins = |begun: Option<(JobKind, Pair)>| match (&todo, begun) {
            (Todo::Rest, Some((_, row))) => shown(&row),
            _ => "refused".to_owned(),
        };
        let step = if todo == Todo::Rest { "it rests" } else { todo.step() };
        lines.push(format!(
            "| {} | {sources} | {step} | {then} | {fails} | {} | {} |",
            shown(&row),
            begins(row.fail_over(opening(9), NOW)),
            begins(row.cancel()),
        ));
    }
    lines.join("\n")
}

#[test]
fn the_table_of_the_manual_is_that_of_the_code() {
    let manual = include_str!("../../../../docs/failover.md");
    assert!(manual.contains(&table()), "docs/failover.md does not have this:\n{}", table());
}

#[test]
fn a_failover_raises_before_it_opens_and_a_cancel_closes_before_it_takes_the_source_back() {
    let source = Pair::new(generation(1));
    let (kind, row) = source.fail_over(opening(1), NOW).unwrap();
    assert_eq!((kind, row.todo()), (JobKind::Failover, Todo::Raise(generation(2))));
    assert!(row.fences(), "refused before anything is done");
    let row = row.done(NOW);
    assert_eq!(row.todo(), Todo::Open(opening(1)));
    let row = row.done(NOW);
    assert_eq!((row.phase, row.todo()), (Phase::Pending, Todo::Rest));
    let (_, row) = row.cancel().unwrap();
    assert_eq!(row.todo(), Todo::Close(opening(1).view));
    let row = row.done(NOW);
    assert_eq!(row.todo(), Todo::Raise(generation(3)));
    let row = row.done(NOW);
    assert_eq!((row.phase, row.open.clone()), (Phase::Source, None));
    for old in [0, 1, 2, 3] {
        assert_eq!(row.taken_for(generation(old), generation(3)), generation(3), "{old}");
    }
}

#[test]
fn whatever_fails_leaves_no_open_view_beside_a_source_that_is_taken() {
    for row in rows() {
        let failed = row.failed(NOW);
        assert!(failed.fences() || failed.open.is_none(), "{row:?}");
        assert_eq!(failed.todo(), Todo::Rest, "{row:?}");
        assert!(failed.open.is_some() || row.open.is_none() || row.phase == Phase::Opening);
    }
}

#[test]
fn a_source_of_another_line_is_never_taken_for_one_of_now() {
    let row = Pair { admits: generation(4), ..Pair::new(generation(6)) };
    for old in [0, 1, 3] {
        assert_eq!(row.taken_for(generation(old), generation(6)), generation(old));
    }
    assert_eq!(row.taken_for(generation(4), generation(6)), generation(6));
    assert_eq!(row.taken_for(generation(7), generation(6)), generation(7), "it is ahead");
}
