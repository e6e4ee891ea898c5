#!/usr/bin/env python3
"""P11, P11b: comparing a volume of which 1 % has changed, and the first copy of a volume.

Usage: ./tools/bench resync [--quick] [--pairs N]

Both sides read and write images on tmpfs, half file data, half random. P11: 4 KiB blocks at random places are changed
behind our back; then `farshore resync` beside rsync, which has to find them as well. P11b: from `farshore protect`
until the target is in order beside nbdcopy to an nbdkit over loopback TCP.
"""

import argparse
import os
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from lib import ours  # noqa: E402
from lib.content import fill  # noqa: E402
from lib.cpu import Chain  # noqa: E402
from lib.pairs import Paired, Ratio, interleave  # noqa: E402
from lib.procs import BenchError, Children, free_port, need, run, wait_until  # noqa: E402
from lib.report import Report  # noqa: E402
from lib.verify import export_equals_file, files_equal  # noqa: E402

PACKAGES = {"rsync": "rsync", "nbdcopy": "libnbd-bin", "nbdkit": "nbdkit", "cmp": "diffutils"}
BLOCK = 4096


def change(images: list[Path], share: float, seed: int) -> int:
    """Writes the same new blocks into each image; returns how many bytes that are."""
    rng = random.Random(seed)
    count = images[0].stat().st_size // BLOCK
    places = rng.sample(range(count), int(count * share))
    contents = [rng.randbytes(BLOCK) for _ in places]
    for image in images:
        with open(image, "r+b", buffering=0) as file:
            for place, content in zip(places, contents, strict=True):
                os.pwrite(file.fileno(), content, place * BLOCK)
    return len(places) * BLOCK


def children_cpu() -> float:
    """User + system seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sent(pid: int) -> int:
    """Bytes that a process has written to sockets and files so far."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise BenchError(f"no account of the bytes of process {pid}")


class Resync:
    """P11: a protected volume, and a copy of it that rsync keeps."""

    def __init__(self, children: Children, size: int, share: float):
        self.own = ours.Replicated(children, size, label="compared")
        self.share, self.size, self.round = share, size, 0
        self.theirs = [children.dir / "rsync-source.img", children.dir / "rsync-target.img"]
        for image in self.theirs:
            fill(image, size)

    def ours(self) -> dict:
        """`farshore resync`, to its end."""
        self.own.settle()
        self.round += 1
        changed = change([self.own.image], self.share, self.round)
        chain, before = Chain(self.own.pids), sent(self.own.pids["agent"])
        chain.begin()
        start = time.monotonic()
        self.own.cli("resync", ours.VOLUME, "--yes", "--wait")
        self.own.settle()
        figures = {"seconds": time.monotonic() - start, "cpu": sum(chain.spent().values())}
        figures["bytes"] = sent(self.own.pids["agent"]) - before
        if not self.own.verify():
            raise BenchError("farshore: source and replica differ after the resync")
        return self.scaled(figures, changed)

    def rsync(self) -> dict:
        """rsync of the image into its copy: both ends on this machine, over a pipe."""
        self.round += 1
        changed = change(self.theirs[:1], self.share, self.round)
        source, target = self.theirs
        cpu, start = children_cpu(), time.monotonic()
        told = run(["rsync", "--inplace", "--no-whole-file", f"--block-size={BLOCK}", "--ignore-times", "--stats",
                    source, target], seconds=600)
        figures = {"seconds": time.monotonic() - start, "cpu": children_cpu() - cpu}
        moved = [line for line in told.splitlines() if line.startswith(("Total bytes sent", "Total bytes received"))]
        figures["bytes"] = sum(int(line.rpartition(":")[2].replace(",", "").replace(".", "")) for line in moved)
        if not files_equal(source, target):
            raise BenchError("rsync: its images differ")
        return self.scaled(figures, changed)

    def scaled(self, figures: dict, changed: int) -> dict:
        """What the goals are written in."""
        figures["mb_per_s"] = self.size / 1e6 / figures["seconds"]
        figures["cpu_s_per_gb"] = figures["cpu"] / (self.size / 1e9)
        figures["over_allowed"] = figures["bytes"] / (1.1 * changed + 0.001 * self.size)
        figures["bytes_by_changed"] = figures["bytes"] / changed
        return figures


class FirstCopy:
    """P11b: an image that nobody has a copy of yet."""

    def __init__(self, children: Children, size: int, compression: bool):
        self.own = ours.Replicated(children, 16 << 20, compression, label="first")
        self.children, self.size, self.round = children, size, 0
        self.source, self.target = children.dir / "copy-source.img", children.dir / "copy-target.img"
        fill(self.source, size)

    def row(self, volume: str) -> dict:
        """The volume's row of the status."""
        return next((row for row in self.own.status()["volumes"] if row["volume"] == volume), {})

    def arrived(self, volume: str) -> bool:
        """In order, and nothing on the way."""
        row = self.row(volume)
        return bool(row) and row["copy_remaining"] == 0 and row["lag_bytes"] == 0 and row["state"] == "protected"

    def ours(self) -> dict:
        """From `protect` until the first point is at the target."""
        self.round += 1
        volume = f"copy-{self.round}"
        chain = Chain(self.own.pids)
        chain.begin()
        start = time.monotonic()
        self.own.cli("protect", str(self.source), "--name", volume, "--policy", "200ms", "--attach", "socket", "--yes")
        wait_until("the first copy", lambda: self.arrived(volume), seconds=300, step=0.1)
        figures = {"seconds": time.monotonic() - start, "cpu": sum(chain.spent().values())}
        self.own.cli("point", "tag", volume, "--name", "copied")
        self.compare(volume)
        self.own.cli("unprotect", volume, "--yes")
        return self.scaled(figures)

    def compare(self, volume: str) -> None:
        """The point and the image are the same."""
        opened = self.own.open_point(volume, "tag:copied")
        try:
            if not export_equals_file(opened, self.source, self.own.root):
                raise BenchError("farshore: source and point differ after the first copy")
        finally:
            self.own.cli("failover", "cleanup", volume, "--yes")

    def nbdcopy(self) -> dict:
        """nbdcopy of the image to an nbdkit over TCP."""
        self.target.unlink(missing_ok=True)
        with open(self.target, "wb") as file:
            file.truncate(self.size)
        port = free_port()
        pid = self.children.start("copy-nbdkit", ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", self.target])
        address = f"nbd://127.0.0.1:{port}"
        wait_until("nbdkit", lambda: answers(address))
        chain = Chain({"nbdkit": pid})
        chain.begin()
        cpu, start = children_cpu(), time.monotonic()
        run(["nbdcopy", self.source, address], seconds=600)
        figures = {"seconds": time.monotonic() - start}
        figures["cpu"] = children_cpu() - cpu + sum(chain.spent().values())
        self.children.stop("copy-nbdkit")
        if not files_equal(self.source, self.target):
            raise BenchError("nbdcopy: its images differ")
        return self.scaled(figures)

    def scaled(self, figures: dict) -> dict:
        """What the goals are written in; speed is better when it is larger."""
        figures["mb_per_s"] = self.size / 1e6 / figures["seconds"]
        figures["cpu_s_per_gb"] = figures["cpu"] / (self.size / 1e9)
        return figures


def answers(address: str) -> bool:
    """Whether an NBD server is there."""
    try:
        run(["nbdinfo", "--size", address])
        return True
    except BenchError:
        return False


def both(figures: Paired, key: str, unit: str) -> str:
    """Medians of both sides, to be read beside the ratio."""
    mine, other = figures.median("ours", key).median, figures.median("base", key).median
    return f"ours {mine:.2f}, theirs {other:.2f} {unit}"


def resync_rows(report: Report, figures: Paired) -> None:
    """rsync is not the peer of the goal: benches/README.md says what stands for what."""
    report.raw["resync"] = {"ours": figures.ours, "base": figures.base}
    report.ratio("P11", "resync of 1 % scattered: wall against rsync", figures.ratio("seconds"), None, None, False, True,
                 both(figures, "mb_per_s", "MB/s"))
    report.ratio("P11", "resync of 1 % scattered: CPU against rsync", figures.ratio("cpu"), None, None, False, True,
                 both(figures, "cpu_s_per_gb", "CPU-s/GB"))
    allowed = Ratio.of([run["over_allowed"] for run in figures.ours])
    report.ratio("P11", "bytes sent / (1.1 x changed + 0.1 % of the disk)", allowed, 1.0, None, False, True,
                 both(figures, "bytes_by_changed", "times what has changed"))


def copy_rows(report: Report, figures: Paired, label: str) -> None:
    """Speed and CPU beside nbdcopy."""
    report.raw[f"first copy, {label}"] = {"ours": figures.ours, "base": figures.base}
    report.ratio("P11b", f"first copy, {label}: speed against nbdcopy", figures.ratio("mb_per_s"), 0.8, 1.0, True, True,
                 both(figures, "mb_per_s", "MB/s"))
    report.ratio("P11b", f"first copy, {label}: CPU against nbdcopy", figures.ratio("cpu"), 1.2, 0.8, False, True,
                 both(figures, "cpu_s_per_gb", "CPU-s/GB"))


def main() -> int:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(prog="./tools/bench resync", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each comparison (default 5)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one pair, little data, figures mean nothing")
    args = parser.parse_args()
    size = 512 << 20
    if args.quick:
        args.pairs, size = 1, 64 << 20
    try:
        need(PACKAGES)
        report = Report("resync", "./tools/bench resync " + " ".join(sys.argv[1:]))
        with Children("resync") as children:
            side = Resync(children, size, 0.01)
            resync_rows(report, interleave(args.pairs, side.ours, side.rsync))
            side.own.close()
        for label, compression in (("TLS, zstd 1", True), ("TLS, no compression", False)):
            with Children("first-copy") as children:
                copy = FirstCopy(children, size, compression)
                copy_rows(report, interleave(args.pairs, copy.ours, copy.nbdcopy), label)
                copy.own.close()
        report.finish()
    except BenchError as failed:
        print(f"resync: the measurement failed: {failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
