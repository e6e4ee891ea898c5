"""Memory (P13): both sides of a protected volume of 1 TiB, and a store with many points beside one with few.

Owns: what counts as memory (resident, without the pool: that is shared memory of a size the user chose).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from lib import build, load, ours
from lib.pairs import Ratio
from lib.procs import BenchError, Children, run, wait_until
from lib.report import ROOT, Report

MIB = 1 << 20
GIB = 1 << 30
OPENS = 200


def resident(pid: int) -> float:
    """MiB of a process, without shared memory."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    return (int(fields["RssAnon"][0]) + int(fields["RssFile"][0])) / 1024


def sides(size: int, writes: int) -> dict[str, float]:
    """MiB of each daemon with one sparse volume of `size`, after so many writes all over it."""
    with Children("farshore-memory") as children:
        own = ours.Replicated(children, size, sparse=True)
        load.finish(load.start(own.socket, own.export, load.Shape(4096, 8, total=4096 * writes)))
        wait_until("everything at the target", own.shipped, seconds=120, step=0.2)
        return {role: resident(pid) for role, pid in own.pids.items()}


def store(directory: str, points: int, writes: int) -> float:
    """MiB that a store with so many points takes when it was opened and then some of its points."""
    program = build.example("store-memory", package="farshore-target")
    place = Path(directory) / f"points-{points}"
    run([program, "fill", place, str(GIB), str(points), str(writes)], seconds=3600)
    before, after = json.loads(run([program, "open", place, str(OPENS)], seconds=600))
    return (after - before) / 1024


def main() -> int:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10_000, help="points of the large store")
    parser.add_argument("--writes", type=int, default=26, help="writes of 4 KiB between two points")
    parser.add_argument("--gib", type=int, default=1024, help="size of the protected volume")
    parser.add_argument("--quick", action="store_true", help="small: the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.points, args.gib = 1000, 16
    report = Report("memory", "./tools/bench memory " + " ".join(sys.argv[1:]))
    found = sides(args.gib * GIB, 20_000)
    per_tib = 1024 / args.gib
    source = Ratio.of([(found["filterd"] + found["agent"]) * per_tib])
    detail = f"filterd {found['filterd']:.0f} + agent {found['agent']:.0f}"
    report.ratio("P13", f"source per TiB without its pool, one volume of {args.gib} GiB: MiB", source, 40, 8, False, True, detail)
    target = Ratio.of([found["target"] * per_tib])
    report.ratio("P13", f"target per TiB, one volume of {args.gib} GiB: MiB", target, 64, 16, False, True, "")
    place = ROOT / ".build/bench"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        many = store(directory, args.points, args.writes)
        few = store(directory, 10, args.points * args.writes // 10)
    value = Ratio.of([many / few])
    name = f"a store and {OPENS} of its points opened: {args.points} points beside 10 with the same writes"
    report.ratio("P13", name, value, 1.2, 1.0, False, True, f"{many:.1f} / {few:.1f} MiB")
    report.raw = {"daemons": found, "many": many, "few": few}
    report.machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
    report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"memory: {error}", file=sys.stderr)
        sys.exit(1)
