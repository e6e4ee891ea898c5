"""What has to be built before a measurement, in release.

Owns: calling cargo (inside the repository only, because of the build folder).
"""

import functools
import os
import subprocess
from pathlib import Path

from lib.procs import BenchError
from lib.report import ROOT


def _cargo(*words: str) -> None:
    done = subprocess.run(["cargo", "build", "--quiet", "--release", "--locked", *words], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise BenchError(f"cargo build {' '.join(words)}: code {done.returncode}")


def _built(path: Path, *words: str) -> Path:
    if "FARSHORE_BENCH_NO_BUILD" not in os.environ:
        _cargo(*words)
    if not path.exists():
        raise BenchError(f"{path.relative_to(ROOT)} was not built")
    return path


@functools.cache
def farshore() -> Path:
    """The product's executable."""
    return _built(ROOT / ".build/release/farshore", "-p", "farshore", "--bin", "farshore")


@functools.cache
def example(name: str, package: str = "farshore-system") -> Path:
    """A helper of the benchmarks: an example of a package."""
    return _built(ROOT / ".build/release/examples" / name, "-p", package, "--example", name)
