"""What is written: half file data, half random, as the rules of measurement ask.

Owns: the corpus file (real file data, made once) and the first content of images.
"""

import os
import random
from pathlib import Path

from lib.procs import BenchError
from lib.report import ROOT

CORPUS_BYTES = 64 << 20
BLOCK = 4096
SOURCES = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/python3", "/usr/lib/gcc", "/usr/share/doc", "/usr/share/perl", "/usr/bin"]


def corpus() -> Path:
    """64 MiB of this machine's file data (libraries, docs, programs), each file padded to 4 KiB."""
    path = ROOT / ".build/bench/corpus.bin"
    if path.exists() and path.stat().st_size == CORPUS_BYTES:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as out:
        for piece in _pieces():
            out.write(piece)
            if out.tell() >= CORPUS_BYTES:
                break
        if out.tell() < CORPUS_BYTES:
            raise BenchError("too little file data on this machine for the corpus")
        out.truncate(CORPUS_BYTES)
    part.replace(path)
    return path


def _pieces():
    """Files in a fixed order, a share of each source in turn, so that no kind dominates."""
    share = CORPUS_BYTES // 4
    for source in SOURCES * 2:
        taken = 0
        for folder, folders, names in os.walk(source):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_symlink() or not path.is_file() or path.suffix == ".gz":
                    continue
                try:
                    data = path.read_bytes()[: 2 << 20]
                except OSError:
                    continue
                yield data + bytes(-len(data) % BLOCK)
                taken += len(data)
                if taken > share:
                    break
            if taken > share:
                break


def fill(image: Path, size: int, seed: int = 1) -> None:
    """A new image of `size` bytes: 64 KiB pieces, file data and random in turn."""
    rng = random.Random(seed)
    piece = 64 << 10
    data = corpus().read_bytes()
    with open(image, "wb") as out:
        for index in range(0, size, piece):
            if (index // piece) % 2 == 0:
                start = rng.randrange(0, len(data) - piece, BLOCK)
                out.write(data[start : start + piece])
            else:
                out.write(rng.randbytes(piece))
        out.truncate(size)
