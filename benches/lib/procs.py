"""Starting and stopping the processes under test.

Owns: every child it started; `Children` ends them all, by pid, when its block is left.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


class BenchError(Exception):
    """The measurement itself failed: the script ends with a non-zero code."""


def need(programs: dict[str, str]) -> None:
    """Every program (name -> Debian package) is installed, or the error says what to install."""
    missing = sorted({package for name, package in programs.items() if shutil.which(name) is None})
    if missing:
        raise BenchError(f"missing programs; install them with: apt-get install -y {' '.join(missing)}")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(what: str, ready: Callable[[], bool], seconds: float = 20.0, step: float = 0.02) -> None:
    """Polls until `ready`; a time-out is a failed measurement."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise BenchError(f"{what}: not within {seconds:.0f} s")
        time.sleep(step)


def accepts(path: Path) -> bool:
    """Whether somebody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
            return True
        except OSError:
            return False


class Children:
    """A scratch folder and the processes living in it."""

    def __init__(self, prefix: str, base: str = "/dev/shm"):
        self.dir = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=base))
        self.running: list[tuple[str, subprocess.Popen]] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for name, _child in reversed(list(self.running)):
            self.stop(name)
        shutil.rmtree(self.dir, ignore_errors=True)

    def start(self, name: str, command: list[str | Path], env: dict[str, str] | None = None) -> int:
        """Starts a daemon; its output goes to NAME.log in the scratch folder. Returns its pid."""
        with open(self.dir / f"{name}.log", "ab") as log:
            child = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
        self.running.append((name, child))
        return child.pid

    def serving(self, name: str, path: Path) -> None:
        """Waits until the daemon listens on `path`, or says what it printed when it died."""

        def ready() -> bool:
            self.check(name)
            return accepts(path)

        wait_until(f"{name} listening on {path.name}", ready)

    def check(self, name: str) -> None:
        """The named daemon is alive."""
        for other, child in self.running:
            if other == name and child.poll() is not None:
                tail = (self.dir / f"{name}.log").read_text(errors="replace")[-2000:]
                raise BenchError(f"{name} ended with code {child.returncode}:\n{tail}")

    def stop(self, name: str) -> None:
        """Ends one daemon: asks, waits, kills."""
        for entry in [entry for entry in self.running if entry[0] == name]:
            child = entry[1]
            self.running.remove(entry)
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(10)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait(10)


def run(command: list[str | Path], seconds: float = 120.0, fine: tuple[int, ...] = (0,)) -> str:
    """Runs a command to its end and returns its standard output; an exit code that is not `fine` is a
    failed measurement."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise BenchError(f"{' '.join(words)}: not finished within {seconds:.0f} s") from late
    if done.returncode not in fine:
        raise BenchError(f"{' '.join(words)}: code {done.returncode}\n{done.stderr[-2000:]}{done.stdout[-500:]}")
    return done.stdout
