"""QEMU's block mirror between two storage daemons: the peer of replication.

Owns: both daemons, their monitors and the mirror job.
"""

import json
import os
import signal
import socket
import time
from pathlib import Path

from lib.fio import uri
from lib.procs import BenchError, Children, free_port, wait_until

QUIET_SECONDS = 0.4


class Monitor:
    """A QMP connection."""

    def __init__(self, path: Path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("r", encoding="utf-8")
        self._read()
        self.call("qmp_capabilities")

    def _read(self) -> dict:
        line = self.lines.readline()
        if not line:
            raise BenchError("the storage daemon closed its monitor")
        return json.loads(line)

    def call(self, command: str, **arguments: object) -> object:
        """Sends one command and returns its result; events in between are dropped."""
        words = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self.sock.sendall(json.dumps(words).encode())
        while True:
            answer = self._read()
            if "error" in answer:
                raise BenchError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """Ends the connection."""
        self.lines.close()
        self.sock.close()


class Mirror:
    """A source daemon with an NBD export, mirroring in the background to a target daemon over TCP.

    Both images must be equal at the start; the job then copies what is written from now on.
    """

    name = "qemu mirror"

    def __init__(self, children: Children, source: Path, target: Path, patience: int = 0):
        """With `patience` the source waits so many seconds for a target that is gone."""
        self.children = children
        self.patience = patience
        self.source, self.target = source, target
        run_dir = children.dir
        self.port = free_port()
        self.pids: dict[str, int] = {}
        self.start_target()
        nbd = run_dir / "ms.nbd"
        source_pid = children.start("mirror-source", self._daemon(
            source, run_dir / "ms.qmp", f"addr.type=unix,addr.path={nbd},max-connections=8"))
        children.serving("mirror-source", nbd)
        self.socket, self.export = nbd, "vol"
        self.uri = uri(nbd, "vol")
        self.pids["source"] = source_pid
        self.monitor = Monitor(run_dir / "ms.qmp")
        self._start_job()

    def start_target(self) -> None:
        """The daemon of the target's image."""
        monitor = self.children.dir / "mt.qmp"
        monitor.unlink(missing_ok=True)
        address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port}"
        self.pids["target"] = self.children.start("mirror-target", self._daemon(self.target, monitor, address))
        self.children.serving("mirror-target", monitor)

    def kill_target(self) -> None:
        """Ends it as a crash does."""
        os.kill(self.pids["target"], signal.SIGKILL)
        self.children.stop("mirror-target")

    @staticmethod
    def _daemon(image: Path, monitor: Path, server: str) -> list[str]:
        return [
            "qemu-storage-daemon",
            "--blockdev", f"driver=file,node-name=f0,filename={image}",
            "--blockdev", "driver=raw,node-name=vol,file=f0",
            "--chardev", f"socket,id=c0,path={monitor},server=on,wait=off",
            "--monitor", "chardev=c0",
            "--nbd-server", server,
            "--export", "type=nbd,id=e0,node-name=vol,name=vol,writable=on",
        ]  # fmt: skip

    def _start_job(self) -> None:
        self.monitor.call("blockdev-add", **{
            "driver": "nbd", "node-name": "dst", "export": "vol",
            "server": {"type": "inet", "host": "127.0.0.1", "port": str(self.port)},
            "reconnect-delay": self.patience,
        })  # fmt: skip
        self.monitor.call("blockdev-mirror", **{
            "job-id": "m0", "device": "vol", "target": "dst", "sync": "none", "copy-mode": "background",
            "on-target-error": "ignore",
        })  # fmt: skip
        wait_until("mirror job ready", lambda: bool(self._job().get("ready")))

    def _job(self) -> dict:
        jobs = self.monitor.call("query-block-jobs")
        if not isinstance(jobs, list) or not jobs:
            raise BenchError("the mirror job is gone")
        return jobs[0]

    def lag_bytes(self) -> int:
        """Bytes not yet taken up by the job, from its dirty bitmap (its own progress is stale)."""
        nodes = self.monitor.call("query-named-block-nodes", flat=True)
        nodes = nodes if isinstance(nodes, list) else []
        if not any(node.get("drv") == "mirror_top" for node in nodes):
            raise BenchError("the mirror's node is gone")
        # Which node the job's bitmap is on depends on the release; there is no other bitmap.
        return sum(bitmap["count"] for node in nodes for bitmap in node.get("dirty-bitmaps", []))

    def settle(self) -> float:
        """Waits until all is at the target; returns the monotonic time at which it was.

        The bitmap does not show what is in flight, so it must stay clean and the job's counter
        still for a while; the comparison of the images afterwards is the proof.
        """
        end = time.monotonic() + 120
        last, since = None, time.monotonic()
        while time.monotonic() - since < QUIET_SECONDS:
            if time.monotonic() > end:
                raise BenchError("the mirror does not converge")
            now = (self.lag_bytes(), self._job()["offset"])
            if now != last or now[0] != 0:
                last, since = now, time.monotonic()
            time.sleep(0.01)
        return since

    def close(self) -> None:
        """Ends both daemons. The job is cancelled with them: both images are closed afterwards."""
        self.monitor.close()
        self.children.stop("mirror-source")
        self.children.stop("mirror-target")
