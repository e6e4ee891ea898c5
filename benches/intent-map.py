"""What the intent map costs a write: capture with the map beside capture without it, on a real disk.

Owns: the loads' meaning is in load/intent_cost.rs; here are only the ratios.
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


def figures(pairs: int) -> dict:
    """Mean and longest time of a write, with and without, of each pair, in microseconds."""
    program = build.example("intent-cost")
    place = ROOT / ".build/bench"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        done = subprocess.run([program, directory, str(pairs)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip())
    return json.loads(done.stdout)


def main() -> int:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--quick", action="store_true", help="one pair: the figures mean nothing")
    args = parser.parse_args()
    report = Report("intent-map", "./tools/bench intent-map " + " ".join(sys.argv[1:]))
    report.note("8192 writes a run; unmarked: no region is marked when the run begins")
    loads = figures(1 if args.quick else args.pairs)
    for name, load in loads.items():
        for what in ("mean", "longest"):
            pairs = load[what]
            value = Ratio.of([a / b for a, b in pairs])
            medians = [Ratio.of([pair[at] for pair in pairs]).median for at in (0, 1)]
            detail = f"{medians[0]:.0f} / {medians[1]:.0f} us"
            report.ratio("-", f"{name}: {what} time of a write, with / without", value, None, None, False, False, detail)
    report.machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
    report.raw = loads
    report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"intent-map: {error}", file=sys.stderr)
        sys.exit(1)
