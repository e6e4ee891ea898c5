#!/usr/bin/env python3
"""P2: our NBD front end against nbdkit, qemu-nbd and qemu-storage-daemon, capture off.

Usage: ./tools/bench front-end [--quick] [--pairs N]
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import fio, ours, peers  # noqa: E402
from lib.content import fill  # noqa: E402
from lib.cpu import Chain  # noqa: E402
from lib.pairs import Paired, interleave  # noqa: E402
from lib.procs import BenchError, Children, need  # noqa: E402
from lib.report import Report  # noqa: E402
from lib.verify import export_equals_file  # noqa: E402



@dataclass(frozen=True)
class Case:
    """One load. At depth 1 chance decides whether client and server share a core, which changes
    the figures fivefold here: there both placements are measured as well, client and server pinned."""

    name: str
    rw: str
    bs: str
    qd: int
    goal: bool
    client_core: int | None = None
    server_core: int | None = None


CASES = [
    Case("4k randwrite qd1", "randwrite", "4k", 1, True),
    Case("4k randwrite qd1 one core", "randwrite", "4k", 1, True, 0, 0),
    Case("4k randwrite qd1 two cores", "randwrite", "4k", 1, True, 0, 1),
    Case("4k randwrite qd16", "randwrite", "4k", 16, True),
    Case("4k randwrite qd64", "randwrite", "4k", 64, True),
    Case("128k write qd16", "write", "128k", 16, False),
    Case("4k randread qd64", "randread", "4k", 64, False),
]


def measure(server: peers.Server, case: Case, seconds: float, size: int) -> dict:
    """One run of one case against one server."""
    chain = Chain(server.pids)
    chain.pin(case.server_core)
    extra = [] if case.client_core is None else [f"--cpus_allowed={case.client_core}"]
    chain.begin()
    figures = fio.load(server.uri, case.rw, case.bs, case.qd, seconds, size, extra)
    figures["cpu_us_per_io"] = sum(chain.spent().values()) * 1e6 / figures["ios"]
    return figures


def compare(report: Report, case: Case, pair: tuple[peers.Server, peers.Server], args, size: int) -> tuple[str, Paired, bool]:
    """Interleaved pairs of one case, then the byte comparison of both servers."""
    own, peer = pair
    figures = interleave(
        args.pairs,
        lambda: measure(own, case, args.seconds, size),
        lambda: measure(peer, case, args.seconds, size),
    )
    verified = all(check(server, size) for server in pair)
    name = f"{case.name} vs {peer.name}"
    report.raw[name] = {"ours": figures.ours, "base": figures.base}
    iops = figures.median("ours", "iops").median / 1000, figures.median("base", "iops").median / 1000
    p50 = figures.median("ours", "p50_us").median, figures.median("base", "p50_us").median
    report.ratio("P2" if case.goal else "-", name + ": IOPS", figures.ratio("iops"), 1.0 if case.goal else None, None,
                 True, verified, f"{iops[0]:.1f}k / {iops[1]:.1f}k IOPS, p50 {p50[0]:.0f} / {p50[1]:.0f} us")
    cpu = figures.median("ours", "cpu_us_per_io").median, figures.median("base", "cpu_us_per_io").median
    must = 0.6 if peer.name == "qemu-storage-daemon" and "write" in case.rw else None
    report.ratio("P2" if must else "-", name + ": server CPU per I/O", figures.ratio("cpu_us_per_io"), must, None,
                 False, verified, f"{cpu[0]:.1f} / {cpu[1]:.1f} us")
    return peer.name, figures, verified


def check(server: peers.Server, size: int) -> bool:
    """Blocks with checksums come back as written, and a file behind the server holds what it serves."""
    fio.write_and_verify(server.uri, min(size, 4 << 20))
    return server.backing is None or export_equals_file(server.uri, server.backing, server.backing.parent)


def best_row(report: Report, case: Case, results: list[tuple[str, Paired, bool]]) -> None:
    """The goal is set against the best peer: the one with the lowest ratio."""
    name, figures, verified = min(results, key=lambda result: result[1].ratio("iops").median)
    report.ratio("P2", f"{case.name} vs the best peer: IOPS", figures.ratio("iops"), 1.0, None, True, verified, name)


def main() -> int:
    """Runs every case against every peer."""
    parser = argparse.ArgumentParser(prog="./tools/bench front-end", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each comparison (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run (default 1)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one pair, short runs, figures mean nothing")
    args = parser.parse_args()
    size = 256 << 20
    if args.quick:
        args.pairs, args.seconds, size = 1, 0.3, 32 << 20
    try:
        need(peers.PACKAGES)
        report = Report("front-end", "./tools/bench front-end " + " ".join(sys.argv[1:]))
        with Children("front-end") as children:
            measure_all(report, children, args, size)
        report.finish()
    except BenchError as failed:
        print(f"front-end: the measurement failed: {failed}", file=sys.stderr)
        return 1
    return 0


def measure_all(report: Report, children: Children, args, size: int) -> None:
    """Memory against memory, file against file (each server has its own image on tmpfs)."""
    images = {}
    for who in ("ours", "nbdkit", "qemu-nbd", "qsd"):
        images[who] = children.dir / f"{who}.img"
        fill(images[who], size)
    memory = ours.ram_front(children, size)
    file = ours.file_front(children, images["ours"])
    pairs = [
        (memory, peers.nbdkit_memory(children, size)),
        (file, peers.nbdkit_file(children, images["nbdkit"])),
        (file, peers.qemu_nbd(children, images["qemu-nbd"])),
        (file, peers.storage_daemon(children, images["qsd"])),
    ]
    for case in CASES:
        results = []
        for pair in pairs:
            results.append(compare(report, case, pair, args, size))
            print(f"{case.name}: {pair[0].name} vs {pair[1].name}: IOPS {results[-1][1].ratio('iops')}, "
                  f"CPU per I/O {results[-1][1].ratio('cpu_us_per_io')}", flush=True)
        if case.goal:
            best_row(report, case, results)


if __name__ == "__main__":
    sys.exit(main())
