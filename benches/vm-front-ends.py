"""The ways to a disk beside each other, in one virtual machine: raw, ublk, kernel NBD, loop.

Information, not goals: a machine without KVM (QEMU's TCG, one CPU) makes system calls and context switches dear, so only
ratios within one boot say anything, and they say it about such a machine.
"""

import argparse
import json
import os
import subprocess
import sys

from lib.pairs import Ratio
from lib.procs import BenchError
from lib.report import ROOT, Report

TEST = "ratios::the_ways_to_a_disk_beside_each_other"
RAW = "raw"
# Ours and what it is held against, beside the raw disk.
PEERS = [
    ("ours by ublk, protected", "ours by ublk, capture off"),
    ("ours by kernel NBD, protected", "nbdkit by kernel NBD"),
    ("ours by ublk, protected", "nbdkit by kernel NBD"),
]


def cargo(*words: str, rounds: int) -> None:
    """Calls cargo with the number of rounds for the machine; raises when it fails."""
    done = subprocess.run(["cargo", *words], cwd=ROOT, env={**os.environ, "FARSHORE_ROUNDS": str(rounds)}, check=False)
    if done.returncode != 0:
        raise BenchError(f"cargo {' '.join(words)}: code {done.returncode}")


def figures(rounds: int) -> dict:
    """Requests a second: of each load, of each way, of each round."""
    cargo("build", "--quiet", "--locked", "-p", "farshore", rounds=rounds)
    cargo("test", "--quiet", "--locked", "-p", "farshore-system", "--test", "vm", "--",
          "--include-ignored", "--exact", TEST, rounds=rounds)  # fmt: skip
    found = list((ROOT / ".build/tmp/vm").glob("ratios*/**/out/ratios.json"))
    if len(found) != 1:
        raise BenchError(f"{len(found)} results where one was expected")
    return json.loads(found[0].read_text())


def ratio(load: dict, ours: str, base: str) -> tuple[Ratio, str]:
    """The ratios of all rounds, and the medians themselves for reading."""
    pairs = list(zip(load[ours], load[base], strict=True))
    medians = [Ratio.of([pair[at] for pair in pairs]).median for at in (0, 1)]
    return Ratio.of([a / b for a, b in pairs]), f"{medians[0]:.0f} / {medians[1]:.0f} IOPS"


def main() -> int:
    """Boots, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--quick", action="store_true", help="one round: the figures mean nothing")
    args = parser.parse_args()
    report = Report("vm-front-ends", "./tools/bench vm-front-ends " + " ".join(sys.argv[1:]))
    report.note("TCG, one CPU for everything, target and agent of a protected volume included: ratios within one boot only")
    loads = figures(1 if args.quick else args.pairs)
    for name, load in loads.items():
        for way in (way for way in load if way != RAW):
            value, detail = ratio(load, way, RAW)
            report.ratio("-", f"{name}: {way} vs raw", value, None, None, True, True, detail)
        for ours, base in PEERS:
            value, detail = ratio(load, ours, base)
            report.ratio("-", f"{name}: {ours} vs {base}", value, None, None, True, True, detail)
    report.machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
    report.raw = loads
    report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        print(f"vm-front-ends: {error}", file=sys.stderr)
        sys.exit(1)
