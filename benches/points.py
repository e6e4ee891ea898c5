"""Opening a point and reading from it (P12): many points beside few, a huge volume beside a small one,
a point beside a plain file with the same content.

Owns: the ratios; the store, the points and the reads are in target/examples/open-points.rs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from lib import build
from lib.pairs import Ratio
from lib.procs import BenchError
from lib.report import ROOT, Report


def figures(points: int, writes: int, rounds: int) -> dict:
    """What the program has measured."""
    program = build.example("open-points", package="farshore-target")
    place = ROOT / ".build/bench"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        command = [program, directory, str(points), str(writes), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip())
    return json.loads(done.stdout)


def main() -> int:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10_000, help="points of the large stores")
    parser.add_argument("--writes", type=int, default=260, help="writes of 4 KiB between two points")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="few points, one round: the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.points, args.rounds = 200, 1
    report = Report("points", "./tools/bench points " + " ".join(sys.argv[1:]))
    found = figures(args.points, args.writes, args.rounds)
    rounds = found["rounds"]
    report.note(
        f"{args.points} points, {found['extents']} extents, {found['layers']} layers at the middle, "
        f"{found['runs']} runs of {found['run_bytes'] >> 20} MiB made in {found['merge_seconds']:.1f} s, "
        f"memory grew by {found['memory_kib'] >> 10} MiB; opening includes the first read"
    )
    p99 = Ratio.of([entry["many"][1] for entry in rounds])
    report.ratio("P12", f"open any of {args.points} points: p99 in ms", p99, 50, 5, False, True, "")
    ways = [
        ("growth from 10 points", "many", "few", 1.2, None),
        ("1 TiB beside 1 GiB", "huge", "many", 1.2, None),
    ]
    for name, one, other, must, moonshot in ways:
        value = Ratio.of([entry[one][0] / entry[other][0] for entry in rounds])
        medians = [Ratio.of([entry[which][0] for entry in rounds]).median for which in (one, other)]
        detail = f"{medians[0]:.2f} / {medians[1]:.2f} ms"
        report.ratio("P12", f"open, median: {name}", value, must, moonshot, False, True, detail)
    value = Ratio.of([entry["reads"][1] / entry["reads"][0] for entry in rounds])
    medians = [Ratio.of([entry["reads"][at] for entry in rounds]).median for at in (1, 0)]
    detail = f"{medians[0]:.1f} / {medians[1]:.1f} us"
    report.ratio("P12", "speed of random 4k reads of a point against a plain file", value, 0.5, 0.9, True, True, detail)
    report.machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
    report.raw = found
    report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"points: {error}", file=sys.stderr)
        sys.exit(1)
