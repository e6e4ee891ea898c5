"""Byte comparison after a run: a run without it does not count."""

import subprocess
from pathlib import Path

from lib.procs import BenchError, run


def export_equals_file(uri: str, image: Path, scratch: Path) -> bool:
    """Reads the whole export and compares it with an image file, byte by byte."""
    copy = scratch / "verify.img"
    try:
        run(["nbdcopy", uri, copy])
        return files_equal(copy, image)
    finally:
        copy.unlink(missing_ok=True)


def files_equal(one: Path, other: Path) -> bool:
    """cmp: equal, different, or a failed measurement."""
    done = subprocess.run(["cmp", "-s", str(one), str(other)], check=False)
    if done.returncode > 1:
        raise BenchError(f"cmp {one} {other}: code {done.returncode}")
    return done.returncode == 0
