#!/usr/bin/env python3
"""P10: how long it takes, under load, to make good what an outage of the target has left behind.

Usage: ./tools/bench catch-up [--quick] [--pairs N]

A writer keeps 50 MB/s up; the target is killed and stays away for 30 s, and comes back. The time until
no more than a tenth of a second of the load is missing there is held against that of QEMU's mirror,
whose target was away as long. The mirror sends what was written over only once; Farshore sends all of it.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import content, load, mirror, ours, peers  # noqa: E402
from lib.pairs import Ratio  # noqa: E402
from lib.procs import BenchError, Children, need  # noqa: E402
from lib.report import Report  # noqa: E402
from lib.verify import files_equal  # noqa: E402

RATE_MB = 50.0
BLOCK, DEPTH = 65536, 8
MIB = 1 << 20
CAUGHT_UP = RATE_MB * 1e6 / 10
PATIENCE = 240.0


def outage(side, kill, start, seconds: float) -> dict:
    """One outage under load; how much was missing at its end, and the seconds until it was made good."""
    shape = load.Shape(BLOCK, DEPTH, RATE_MB, seconds=seconds + PATIENCE)
    writer = load.start(side.socket, side.export, shape)
    try:
        time.sleep(2)
        kill()
        time.sleep(seconds)
        missing = side.lag_bytes()
        start()
        back = time.monotonic()
        while side.lag_bytes() > CAUGHT_UP:
            if writer.poll() is not None:
                raise BenchError(f"{side.name}: the writer has ended: {writer.communicate()[1]}")
            if time.monotonic() > back + PATIENCE:
                raise BenchError(f"{side.name}: not caught up within {PATIENCE:.0f} s, {side.lag_bytes()} bytes are missing")
            time.sleep(0.05)
        return {"missing_mb": missing / 1e6, "seconds": time.monotonic() - back}
    finally:
        writer.terminate()
        writer.communicate()


def own(size: int, seconds: float) -> dict:
    """Farshore: pool and spool as they are by default, but for their room."""
    with Children("catch-up") as children:
        side = ours.Replicated(children, size, agent='spool_max = "4GiB"\n')

        def kill() -> None:
            os.kill(side.pids["target"], signal.SIGKILL)
            children.stop(f"{side.label}-target")

        found = outage(side, kill, lambda: side.daemon("target", "target", "run"), seconds)
        found["in_order"] = side.ordered()
        side.settle()
        if not side.verify():
            raise BenchError("source and point differ after the outage")
        return found


def theirs(size: int, seconds: float) -> dict:
    """QEMU's mirror, told to wait for its target."""
    with Children("catch-up") as children:
        images = [children.dir / "source.img", children.dir / "target.img"]
        for image in images:
            content.fill(image, size)
        side = mirror.Mirror(children, *images, patience=int(seconds + PATIENCE))
        found = outage(side, side.kill_target, side.start_target, seconds)
        side.settle()
        side.close()
        if not files_equal(*images):
            raise BenchError("the images of the mirror differ after the outage")
        return found


def main() -> int:
    """Runs the pairs and prints a row."""
    parser = argparse.ArgumentParser(prog="./tools/bench catch-up", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of outages (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short pair: the figures mean nothing")
    args = parser.parse_args()
    size, seconds = (128 * MIB, 3.0) if args.quick else (1024 * MIB, 30.0)
    try:
        need(peers.PACKAGES)
        report = Report("catch-up", "./tools/bench catch-up " + " ".join(sys.argv[1:]))
        pairs = []
        for number in range(1 if args.quick else args.pairs):
            sides = (own, theirs) if number % 2 == 0 else (theirs, own)
            found = {side.__name__: side(size, seconds) for side in sides}
            pairs.append((found["own"], found["theirs"]))
            print(f"pair {number + 1}: {found}", flush=True)
        report.raw = {"pairs": pairs}
        faster = Ratio.of([b["seconds"] / a["seconds"] for a, b in pairs])
        detail = "; ".join(f"{a['missing_mb']:.0f} MB in {a['seconds']:.1f} s / {b['missing_mb']:.0f} MB in {b['seconds']:.1f} s"
                           for a, b in pairs)
        report.ratio("P10", f"{seconds:.0f} s without the target at {RATE_MB:.0f} MB/s: time of QEMU's mirror by ours", faster, 2.0,
                     None, True, True, detail)
        kept = sum(a["in_order"] for a, _ in pairs)
        report.note(f"order and every point were kept in {kept} of {len(pairs)} outages")
        report.machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
        report.finish()
    except BenchError as failed:
        print(f"catch-up: the measurement failed: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
