#!/usr/bin/env python3
"""P4: CPU-seconds for each replicated GB, source and target together, against QEMU's block mirror.

Usage: ./tools/bench replication [--quick] [--pairs N]

Both sides serve an image on tmpfs over a unix socket and replicate over loopback TCP to an image or
a journal on tmpfs. Ours always uses TLS 1.3; QEMU's connection is clear. The same amount is written
in every run; CPU counts from the first write until everything is at the target.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import load, ours, peers  # noqa: E402
from lib.content import fill  # noqa: E402
from lib.cpu import Chain  # noqa: E402
from lib.mirror import Mirror  # noqa: E402
from lib.pairs import Paired, interleave  # noqa: E402
from lib.procs import BenchError, Children, need  # noqa: E402
from lib.report import Report  # noqa: E402
from lib.verify import files_equal  # noqa: E402

MB = 10**6
# (name, load, must and moonshot with TLS and default compression, the same without compression)
CASES = [
    ("64k randwrite at 100 MB/s", load.Shape(65536, 8, 100.0, total=250 * MB), (0.8, 0.5)),
    ("64k randwrite full speed", load.Shape(65536, 8, total=400 * MB), (0.8, 0.5)),
    ("4k randwrite at 20 MB/s", load.Shape(4096, 16, 20.0, total=50 * MB), (0.25, 0.1)),
    ("4k randwrite full speed", load.Shape(4096, 32, total=100 * MB), (0.25, 0.1)),
]


class MirrorSide:
    """QEMU's mirror, made to look like one side of the comparison."""

    name = "qemu mirror background"

    def __init__(self, children: Children, size: int):
        self.images = children.dir / "mirror-source.img", children.dir / "mirror-target.img"
        for image in self.images:
            fill(image, size)
        self.mirror = Mirror(children, *self.images)
        self.socket, self.export, self.pids = self.mirror.socket, self.mirror.export, self.mirror.pids
        self.lag_bytes, self.settle, self.close = self.mirror.lag_bytes, self.mirror.settle, self.mirror.close
        self.lag_period = 0.1

    def order_lost(self) -> bool:
        """It never keeps any."""
        return False

    def verify(self) -> bool:
        """Source and replica image are equal."""
        return files_equal(*self.images)


def measure(side, shape: load.Shape) -> dict:
    """Writes, waits until all of it is at the target, counts, then compares source and replica."""
    chain = Chain(side.pids)
    chain.begin()
    with load.Sampler(side.lag_bytes, side.lag_period) as lag:
        figures = load.finish(load.start(side.socket, side.export, shape))
    ended = time.monotonic()
    figures["order_lost"] = side.order_lost()
    figures["settle_s"] = max(0.0, side.settle() - ended)
    spent = chain.spent()
    gigabytes = figures["bytes"] / 1e9
    for who, seconds in spent.items():
        figures[f"cpu_{who}"] = seconds / gigabytes
    figures["cpu_s_per_gb"] = sum(spent.values()) / gigabytes
    figures["lag_max_mb"] = max(lag.samples, default=0) / MB
    figures["through_mb_per_s"] = figures["bytes"] / MB / (figures["seconds"] + figures["settle_s"])
    if not side.verify():
        raise BenchError(f"{side.name}: source and replica differ after the run")
    return figures


def scaled(shape: load.Shape, quick: bool) -> load.Shape:
    """A smoke test writes a twentieth."""
    if not quick or shape.total is None:
        return shape
    return load.Shape(shape.bs, shape.qd, shape.rate_mb, total=shape.total // 20)


def split(side: str, figures: Paired) -> str:
    """CPU by process, medians."""
    names = [key for key in getattr(figures, side)[0] if key.startswith("cpu_") and key != "cpu_s_per_gb"]
    return " + ".join(f"{key[4:]} {figures.median(side, key).median:.2f}" for key in names)


def add_rows(report: Report, case: str, goal: tuple[float, float] | None, figures: Paired) -> None:
    """The ratio that is the goal, the plain figures beside it, and the lag."""
    report.raw[case] = {"ours": figures.ours, "base": figures.base}
    must, moonshot = goal or (None, None)
    report.ratio("P4" if goal else "-", f"{case}: CPU per replicated GB", figures.ratio("cpu_s_per_gb"), must, moonshot,
                 False, True, f"ours {split('ours', figures)}; mirror {split('base', figures)}")
    lost = sum(run["order_lost"] for run in figures.ours)
    for side, who in (("ours", "ours"), ("base", "mirror")):
        speed, lag = figures.median(side, "through_mb_per_s").median, figures.median(side, "lag_max_mb").median
        settle = figures.median(side, "settle_s").median
        report.figure("-", f"{case}: {who}", "CPU-s/GB", figures.median(side, "cpu_s_per_gb"), True,
                      f"{speed:.0f} MB/s until all is at the target; most lag {lag:.1f} MB; caught up {settle * 1000:.0f} ms after the load"
                      + (f"; order lost in {lost} of {len(figures.ours)} runs" if lost and side == "ours" else ""))


def measure_all(report: Report, args, size: int) -> None:
    """Each variant of ours against the mirror; both live side by side, one idle while the other runs."""
    variants: list[tuple[str, Callable[[Children], ours.Replicated]]] = [
        ("TLS, zstd 1", lambda children: ours.Replicated(children, size)),
        ("TLS, no compression", lambda children: ours.Replicated(children, size, compression=False)),
    ]
    for label, make in variants:
        for name, shape, goal in CASES:
            with Children("replication") as children:
                own, peer = make(children), MirrorSide(children, size)
                run_shape = scaled(shape, args.quick)
                figures = interleave(args.pairs, lambda: measure(own, run_shape), lambda: measure(peer, run_shape))
                own.close()
                peer.close()
            print(f"{name}, {label}: CPU {figures.ratio('cpu_s_per_gb')}", flush=True)
            add_rows(report, f"{name}, {label}", goal, figures)


def main() -> int:
    """Runs every case of both variants."""
    parser = argparse.ArgumentParser(prog="./tools/bench replication", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each comparison (default 5)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one pair, little data, figures mean nothing")
    args = parser.parse_args()
    size = 512 << 20
    if args.quick:
        args.pairs, size = 1, 64 << 20
    try:
        need(peers.PACKAGES)
        report = Report("replication", "./tools/bench replication " + " ".join(sys.argv[1:]))
        measure_all(report, args, size)
        report.finish()
    except BenchError as failed:
        print(f"replication: the measurement failed: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
