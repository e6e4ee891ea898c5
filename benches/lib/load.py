"""Our own load generator: real content (half file data, half random), optional fixed rate.

Owns: building and calling benches/load/nbd_load.rs.
"""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.build import example
from lib.content import corpus
from lib.procs import BenchError


@dataclass(frozen=True)
class Shape:
    """What the load looks like; `rate_mb` 0 is full speed, in MB (10^6 bytes) a second."""

    bs: int
    qd: int
    rate_mb: float = 0.0
    seconds: float | None = None
    total: int | None = None

    def words(self) -> list[str]:
        """As options of the generator."""
        words = ["--bs", str(self.bs), "--qd", str(self.qd), "--rate-mb", str(self.rate_mb)]
        words += ["--seconds", str(self.seconds)] if self.seconds is not None else []
        return words + (["--bytes", str(self.total)] if self.total is not None else [])


_seed = 0


def start(socket: Path, export: str, shape: Shape) -> subprocess.Popen:
    """Starts a load; every call writes other places and other bytes."""
    global _seed
    _seed += 1
    return subprocess.Popen(
        [
            str(example("nbd-load")), "--socket", str(socket), "--export", export,
            "--corpus", str(corpus()), "--seed", str(_seed), *shape.words(),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(running: subprocess.Popen, seconds: float = 300.0) -> dict:
    """Waits for a load and returns its figures: ios, bytes, seconds, iops, mb_per_s, p50_us, p99_us."""
    try:
        output, errors = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as late:
        running.kill()
        running.communicate()
        raise BenchError("the load did not end in time") from late
    if running.returncode != 0:
        raise BenchError(f"the load failed: {errors.strip()}")
    return json.loads(output)


class Sampler:
    """Calls `probe` every `period` seconds beside a load and keeps the answers."""

    def __init__(self, probe: Callable[[], float], period: float):
        self.samples: list[float] = []
        self._probe, self._period = probe, period
        self._end = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._loop)

    def _loop(self) -> None:
        try:
            while not self._end.is_set():
                begun = time.monotonic()
                self.samples.append(self._probe())
                self._end.wait(max(0.0, self._period - (time.monotonic() - begun)))
        except (BenchError, OSError, ValueError) as failed:
            self._failed = failed

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._failed is not None:
            raise BenchError(f"sampling failed: {self._failed}")
