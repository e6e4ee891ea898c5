"""The NBD servers others made, started as the study ran them."""

from dataclasses import dataclass
from pathlib import Path

from lib.fio import uri
from lib.procs import Children

PACKAGES = {
    "fio": "fio",
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-utils",
    "cmp": "diffutils",
}


@dataclass(frozen=True)
class Server:
    """A running NBD server."""

    name: str
    uri: str
    pids: dict[str, int]
    backing: Path | None


def nbdkit_memory(children: Children, size: int) -> Server:
    """nbdkit with its memory plug-in."""
    sock = children.dir / "nbdkit-memory.sock"
    pid = children.start("nbdkit-memory", ["nbdkit", "-f", "-U", sock, "memory", str(size)])
    children.serving("nbdkit-memory", sock)
    return Server("nbdkit memory", uri(sock), {"nbdkit": pid}, None)


def nbdkit_file(children: Children, image: Path) -> Server:
    """nbdkit on a file."""
    sock = children.dir / "nbdkit-file.sock"
    pid = children.start("nbdkit-file", ["nbdkit", "-f", "-U", sock, "file", image])
    children.serving("nbdkit-file", sock)
    return Server("nbdkit file", uri(sock), {"nbdkit": pid}, image)


def qemu_nbd(children: Children, image: Path) -> Server:
    """qemu-nbd on a raw file."""
    sock = children.dir / "qemu-nbd.sock"
    pid = children.start("qemu-nbd", ["qemu-nbd", "-t", "-e", "8", "-k", sock, "-f", "raw", image])
    children.serving("qemu-nbd", sock)
    return Server("qemu-nbd", uri(sock), {"qemu-nbd": pid}, image)


def storage_daemon(children: Children, image: Path) -> Server:
    """qemu-storage-daemon on a raw file."""
    sock = children.dir / "qsd.sock"
    pid = children.start(
        "qsd",
        [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=f0,filename={image}",
            "--blockdev", "driver=raw,node-name=vol,file=f0",
            "--nbd-server", f"addr.type=unix,addr.path={sock},max-connections=8",
            "--export", "type=nbd,id=e0,node-name=vol,name=vol,writable=on",
        ],
    )  # fmt: skip
    children.serving("qsd", sock)
    return Server("qemu-storage-daemon", uri(sock, "vol"), {"qemu-storage-daemon": pid}, image)
