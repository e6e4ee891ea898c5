#!/usr/bin/env python3
"""P1 and P3: what protection costs the writer, against the same front end with capture off.

Usage: ./tools/bench filter-tax [--quick] [--pairs N]

Three stages serve an image on tmpfs over a unix socket: the front end and backing code without the
filter; filterd with its records released at once; filterd, agent and target on the same cores.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import load, ours, peers  # noqa: E402
from lib.cpu import Chain  # noqa: E402
from lib.pairs import Paired, interleave  # noqa: E402
from lib.procs import BenchError, Children, need  # noqa: E402
from lib.report import Report  # noqa: E402

# The load beside the writes whose latency P3 is about: MB/s in 64 KiB writes. The writer itself does
# 1,000 writes a second; at full speed it would be a load of 400 MB/s, not a probe of latency.
BACKGROUND_MB = 20.0
PROBE_MB = 4.096


def throughput(side, shape: load.Shape) -> dict:
    """One run at full speed. CPU of all daemons counts until everything is where it belongs."""
    chain = Chain(side.pids)
    chain.begin()
    figures = load.finish(load.start(side.socket, side.export, shape))
    return finish(side, chain, figures)


def latency(side, shape: load.Shape) -> dict:
    """One writer at queue depth 1 beside the background load."""
    chain = Chain(side.pids)
    chain.begin()
    beside = load.Shape(65536, 8, BACKGROUND_MB, seconds=(shape.seconds or 1.0) + 0.4)
    background = load.start(side.socket, side.export, beside)
    figures = load.finish(load.start(side.socket, side.export, shape))
    figures["background_mb"] = load.finish(background)["mb_per_s"]
    return finish(side, chain, figures)


def finish(side, chain: Chain, figures: dict) -> dict:
    """What the run cost, whether order held, and the byte comparison that makes it count."""
    figures["order_lost"] = side.order_lost()
    side.settle()
    figures["cpu_us_per_io"] = sum(chain.spent().values()) * 1e6 / figures["ios"]
    if not side.verify():
        raise BenchError(f"{side.name}: the comparison after the run failed")
    return figures


def broken(figures: Paired) -> str:
    """Runs in which the chain was slower than the writer and went over to copying."""
    runs = sum(bool(run["order_lost"]) for run in figures.ours)
    return f"; order lost in {runs} of {len(figures.ours)} runs" if runs else ""


def tax(report: Report, stage: str, own, bare, args, goals: tuple[float, float]) -> None:
    """P1: IOPS at two depths."""
    for qd in (16, 64):
        shape = load.Shape(4096, qd, seconds=args.seconds)
        figures = interleave(args.pairs, lambda: throughput(own, shape), lambda: throughput(bare, shape))
        case = f"4k randwrite qd{qd}, {stage} vs capture off"
        report.raw[case] = {"ours": figures.ours, "base": figures.base}
        iops = [figures.median(side, "iops").median / 1000 for side in ("ours", "base")]
        cpu = [figures.median(side, "cpu_us_per_io").median for side in ("ours", "base")]
        report.ratio("P1", f"{case}: IOPS", figures.ratio("iops"), *goals, True, True,
                     f"{iops[0]:.1f}k / {iops[1]:.1f}k IOPS{broken(figures)}")
        report.ratio("-", f"{case}: CPU of all daemons per write", figures.ratio("cpu_us_per_io"), None, None,
                     False, True, f"{cpu[0]:.1f} / {cpu[1]:.1f} us")
        print(f"{case}: IOPS {figures.ratio('iops')}{broken(figures)}", flush=True)


def added_latency(report: Report, stage: str, own, bare, args, goal: bool) -> None:
    """P3: p50 and p99 of one writer beside 20 MB/s."""
    shape = load.Shape(4096, 1, PROBE_MB, seconds=args.seconds)
    figures = interleave(args.pairs, lambda: latency(own, shape), lambda: latency(bare, shape))
    case = f"4k randwrite qd1, 1,000/s beside {BACKGROUND_MB:.0f} MB/s, {stage} vs capture off"
    report.raw[case] = {"ours": figures.ours, "base": figures.base}
    for name, key, must, moonshot in (("p50", "p50_us", 1.15, 1.05), ("p99", "p99_us", 1.5, 1.2)):
        own_us, bare_us = figures.median("ours", key).median, figures.median("base", key).median
        report.ratio("P3" if goal else "-", f"{case}: {name}", figures.ratio(key), must if goal else None,
                     moonshot if goal else None, False, True, f"{own_us:.1f} / {bare_us:.1f} us{broken(figures)}")
    print(f"{case}: p50 {figures.ratio('p50_us')}, p99 {figures.ratio('p99_us')}", flush=True)


def measure_all(report: Report, args, size: int) -> None:
    """Each stage beside the bare front end, which idles while the other runs."""
    with Children("filter-tax") as children:
        bare, own = ours.Bare(children, size), ours.Captured(children, size)
        tax(report, "capture only", own, bare, args, (0.90, 0.97))
        added_latency(report, "capture only", own, bare, args, goal=False)
        own.close()
    with Children("filter-tax") as children:
        bare, own = ours.Bare(children, size), ours.Replicated(children, size)
        tax(report, "agent and target on the same cores", own, bare, args, (0.60, 0.75))
        added_latency(report, "agent and target on the same cores", own, bare, args, goal=True)
        own.close()


def main() -> int:
    """Runs both stages."""
    parser = argparse.ArgumentParser(prog="./tools/bench filter-tax", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of each comparison (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run (default 1)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one pair, short runs, figures mean nothing")
    args = parser.parse_args()
    size = 256 << 20
    if args.quick:
        args.pairs, args.seconds, size = 1, 0.3, 32 << 20
    try:
        need(peers.PACKAGES)
        report = Report("filter-tax", "./tools/bench filter-tax " + " ".join(sys.argv[1:]))
        measure_all(report, args, size)
        report.finish()
    except BenchError as failed:
        print(f"filter-tax: the measurement failed: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
