"""Speed of the journal against fio with the same pattern (P7), and what the disk writes for a byte that
comes in while old points are merged into the base (P8).

Owns: the ratios; batches, store and merging are in target/examples/ingest.rs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lib import build, fio
from lib.pairs import Ratio
from lib.procs import BenchError, run
from lib.report import ROOT, Report


def ours(place: str, *words: int) -> dict:
    """One run of the store in a new folder."""
    program = build.example("ingest", package="farshore-target")
    with tempfile.TemporaryDirectory(dir=place) as directory:
        command = [program, directory, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip())
    return json.loads(done.stdout)


def theirs(file: Path, mib: int, each: int) -> float:
    """Bytes a second of durable writes of so many MiB, one after the other, into a written file."""
    command = ["fio", "--name=journal", f"--filename={file}", "--rw=write", f"--bs={each}m", f"--size={mib}m"]
    how = ["--direct=1", "--sync=dsync", "--overwrite=1", "--refill_buffers=1", "--output-format=json"]
    found = fio.parse(run([*command, *how]), "write")
    return found["bytes"] / found["seconds"]


def main() -> int:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--mib", type=int, default=1024, help="written in a run")
    parser.add_argument("--quick", action="store_true", help="one short pair: the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.mib = 1, 128
    report = Report("ingest", "./tools/bench ingest " + " ".join(sys.argv[1:]))
    report.note("prewriting segments is what a worker does when it is idle; it is not in the speed")
    place = ROOT / ".build/bench"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        file = Path(directory) / "fio"
        theirs(file, args.mib, 1)
        for each, must, moonshot in ((1, 0.9, 1.0), (7, 0.8, 0.95)):
            pairs = []
            for n in range(args.pairs):
                sides = [lambda: theirs(file, args.mib, each), lambda: ours(directory, args.mib, each)]
                first, second = [side() for side in (sides if n % 2 == 0 else sides[::-1])]
                beside, found = (first, second) if n % 2 == 0 else (second, first)
                pairs.append((found["bytes"] / found["seconds"], beside))
            value = Ratio.of([a / b for a, b in pairs])
            medians = [Ratio.of([pair[at] for pair in pairs]).median / 1e6 for at in (0, 1)]
            detail = f"{medians[0]:.0f} / {medians[1]:.0f} MB/s"
            report.ratio("P7", f"commit per {each} MiB beside fio", value, must, moonshot, True, True, detail)
        runs = [ours(directory, 2 * args.mib, 1, args.mib // 2) for _ in range(min(args.pairs, 3))]
    value = Ratio.of([found["amplification"] for found in runs])
    report.ratio("P8", "bytes written to disk for a byte that came in", value, 2.2, 1.1, False, True, "with merging into the base")
    report.machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
    report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"ingest: {error}", file=sys.stderr)
        sys.exit(1)
