#!/usr/bin/env python3
"""P10: what the writer feels while the target is away, stage by stage, in one run.

Usage: ./tools/bench outage [--quick] [--outages N]

A writer keeps 50 MB/s up while the target is killed, stays away and comes back. The room for what
waits is made small, so that one outage goes through all stages: pool, spool, full spool, dirty map,
and the way back. Slices of this load alternate with slices of the same load on a front end with
capture off, so that a drifting machine hits both; a stage's figure is ours by theirs in this stage,
divided by ours by theirs before the outage. At the end a point is compared with the source.
"""

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import load, ours, peers  # noqa: E402
from lib.pairs import Ratio  # noqa: E402
from lib.procs import BenchError, Children, need, wait_until  # noqa: E402
from lib.report import Report  # noqa: E402

RATE_MB = 50.0
SLICE_SECONDS = 0.5
BLOCK, DEPTH = 65536, 8
MIB = 1 << 20
# Longest stay in a stage: the next one must come by itself.
PATIENCE = 120.0
STAGES = ["before", "pool", "spool", "spool full", "dirty map", "coming back", "after"]


class Guest:
    """The pairs of slices of one outage, by stage."""

    def __init__(self, own: ours.Replicated, bare: ours.Bare, seconds: float):
        self.own, self.bare = own, bare
        self.shape = load.Shape(BLOCK, DEPTH, RATE_MB, seconds=seconds)
        self.pairs: dict[str, list[tuple[dict, dict]]] = {stage: [] for stage in STAGES}
        self.turn = 0

    def _slice(self, side) -> dict:
        return load.finish(load.start(side.socket, side.export, self.shape))

    def pair(self, stage: str) -> None:
        """One slice of each side, the order changing from pair to pair."""
        self.turn += 1
        if self.turn % 2 == 0:
            own, bare = self._slice(self.own), self._slice(self.bare)
        else:
            bare, own = self._slice(self.bare), self._slice(self.own)
        self.pairs[stage].append((own, bare))


def stage_of(row: dict) -> str:
    """Where the changes of the volume go at the moment, while the target is away."""
    if row["copy_remaining"] > 0:
        return "dirty map"
    return {"direct": "pool", "draining": "pool", "spooling": "spool", "full": "spool full"}.get(
        (row["spool"] or {}).get("level", "direct"), "pool")


def outage(guest: Guest, own: ours.Replicated, slices: int) -> dict:
    """One outage from order to order; returns how long the target was away and what it took to catch up."""
    for _ in range(slices):
        guest.pair("before")
    os.kill(own.pids["target"], signal.SIGKILL)
    own.children.stop(f"{own.label}-target")
    away = time.monotonic()
    deadline = away + 2 * PATIENCE
    enough = len(guest.pairs["dirty map"]) + slices
    while len(guest.pairs["dirty map"]) < enough:
        begun = stage_of(own.row())
        guest.pair(begun)
        if stage_of(own.row()) != begun:
            # It began in one stage and ended in another: the worse of both has to answer for it.
            guest.pairs[stage_of(own.row())].append(guest.pairs[begun].pop())
        if time.monotonic() > deadline:
            raise BenchError(f"the outage did not get past {begun}: {own.row()}")
    away = time.monotonic() - away
    waiting = own.row()["spool"]["bytes"] + own.row()["copy_remaining"]
    own.daemon("target", "target", "run")
    own.children.serving(f"{own.label}-target", own.root / "run/target.sock")
    back = time.monotonic()
    while not own.ordered() or own.row()["spool"]["bytes"] > 0:
        guest.pair("coming back")
        if time.monotonic() > back + PATIENCE:
            raise BenchError(f"order did not come back: {own.row()}")
    caught_up = time.monotonic() - back
    for _ in range(slices):
        guest.pair("after")
    return {"away_s": away, "waiting_mb": waiting / 1e6, "caught_up_s": caught_up}


def ratios(guest: Guest, key: str, stage: str) -> Ratio:
    """Ours by theirs in the pairs of a stage, over the median of that before the outage."""
    before = statistics.median(own[key] / bare[key] for own, bare in guest.pairs["before"])
    return Ratio.of([own[key] / bare[key] / before for own, bare in guest.pairs[stage]])


def add_rows(report: Report, guest: Guest, outages: list[dict]) -> None:
    """A row a stage for the speed, which is the goal, and for the latency."""
    report.raw = {"pairs": guest.pairs, "outages": outages}
    for stage in STAGES[1:]:
        if not guest.pairs[stage]:
            raise BenchError(f"no slice of the load was in the stage {stage}: nothing can be said of it")
        speed = [own["mb_per_s"] for own, _ in guest.pairs[stage]]
        p99 = statistics.median(own["p99_us"] for own, _ in guest.pairs[stage])
        longest = max(own["max_us"] for own, _ in guest.pairs[stage]) / 1000
        report.ratio("P10", f"{RATE_MB:.0f} MB/s, {stage}: speed of the guest", ratios(guest, "mb_per_s", stage),
                     0.95, None, True, True, f"{statistics.median(speed):.1f} MB/s, slowest slice {min(speed):.1f}; "
                     f"longest wait of a write {longest:.0f} ms")
        report.ratio("-", f"{RATE_MB:.0f} MB/s, {stage}: p50 of writes", ratios(guest, "p50_us", stage), None, None,
                     False, True)
        report.ratio("-", f"{RATE_MB:.0f} MB/s, {stage}: p99 of writes", ratios(guest, "p99_us", stage), None, None,
                     False, True, f"{p99:.0f} us")
    speeds = [one["waiting_mb"] / one["caught_up_s"] for one in outages]
    report.figure("-", "catching up under the load", "MB/s", Ratio.of(speeds), True,
                  "; ".join(f"away {one['away_s']:.0f} s, {one['waiting_mb']:.0f} MB waiting, in order after "
                            f"{one['caught_up_s']:.1f} s" for one in outages))


def measure(report: Report, args) -> None:
    """All outages, one after the other, on one pair of sides."""
    size, pool, spool = (64, 32, 24) if args.quick else (512, 256, 512)
    slices = 2 if args.quick else 10
    with Children("outage") as children:
        bare = ours.Bare(children, size * MIB)
        own = ours.Replicated(children, size * MIB, pool=f"{pool}MiB", agent=f'spool_max = "{spool}MiB"\n')
        guest = Guest(own, bare, 0.2 if args.quick else SLICE_SECONDS)
        outages = []
        for number in range(args.outages):
            outages.append(outage(guest, own, slices))
            own.settle()
            if not own.verify() or not bare.verify():
                raise BenchError("source and point differ after the outage")
            wait_until("everything to be at the target", own.shipped, seconds=60)
            print(f"outage {number + 1}: {', '.join(f'{s} {len(guest.pairs[s])}' for s in STAGES)} pairs", flush=True)
        own.close()
        add_rows(report, guest, outages)


def main() -> int:
    """Runs the outages and prints a row a stage."""
    parser = argparse.ArgumentParser(prog="./tools/bench outage", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outages", type=int, default=3, help="outages, one after the other (default 3)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one short outage, figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.outages = 1
    try:
        need(peers.PACKAGES)
        report = Report("outage", "./tools/bench outage " + " ".join(sys.argv[1:]))
        measure(report, args)
        report.finish()
    except BenchError as failed:
        print(f"outage: the measurement failed: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
