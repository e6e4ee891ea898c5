"""Farshore's own processes, started as a person would start them, under one `--root` folder.

Owns: the daemons of one side of a comparison. Three stages of the same write path:
`ram_front` and `file_front` (the NBD front end with capture off), `Captured` (filterd, records
thrown away at once) and `Replicated` (filterd, agent and target).
"""

import json
import time
from pathlib import Path

from lib.build import example, farshore
from lib.content import fill
from lib.fio import uri
from lib.peers import Server
from lib.procs import BenchError, Children, free_port, run, wait_until
from lib.verify import export_equals_file

VOLUME = "vol"
HOST = "source"
POOL = "256MiB"


def ram_front(children: Children, size: int) -> Server:
    """The NBD front end on a RAM disk."""
    sock = children.dir / "ours-memory.sock"
    pid = children.start("ours-memory", [example("bare-front"), "--socket", sock, "--memory", str(size)])
    children.serving("ours-memory", sock)
    return Server("farshore memory", uri(sock, VOLUME), {"front": pid}, None)


def file_front(children: Children, image: Path, name: str = "ours-file") -> Server:
    """The NBD front end on the backing code of filterd, without the filter between them."""
    sock = children.dir / f"{name}.sock"
    pid = children.start(name, [example("bare-front"), "--socket", sock, "--file", image])
    children.serving(name, sock)
    return Server("farshore file", uri(sock, VOLUME), {"front": pid}, image)


class Bare:
    """Capture off, as one side of a tax comparison."""

    name = "capture off"

    def __init__(self, children: Children, size: int):
        image = children.dir / "bare.img"
        fill(image, size)
        server = file_front(children, image, "bare")
        self.socket, self.export, self.uri, self.pids = children.dir / "bare.sock", VOLUME, server.uri, server.pids
        self.image, self.scratch = image, children.dir

    def order_lost(self) -> bool:
        """There is no order to lose."""
        return False

    def settle(self) -> float:
        """Nothing is behind."""
        return time.monotonic()

    def verify(self) -> bool:
        """What is served is what the file holds."""
        return export_equals_file(self.uri, self.image, self.scratch)


class _Source:
    """filterd with one protected volume."""

    def __init__(self, children: Children, size: int, label: str, sparse: bool = False):
        self.children, self.label = children, label
        self.pool = POOL
        self.root = children.dir / label
        self.root.mkdir()
        self.image = self.root / "source.img"
        if sparse:
            with open(self.image, "wb") as image:
                image.truncate(size)
        else:
            fill(self.image, size)
        self.pids: dict[str, int] = {}

    def cli(self, *words: str, fine: tuple[int, ...] = (0,)) -> str:
        """Runs one command against this root."""
        return run([farshore(), "--root", self.root, *words], fine=fine)

    def daemon(self, name: str, *words: str) -> None:
        """Starts one role."""
        self.pids[name] = self.children.start(
            f"{self.label}-{name}", [farshore(), "--root", self.root, *words], env={"RUST_LOG": "warn"})

    def start_filterd(self) -> None:
        """filterd, and the volume protected."""
        self.daemon("filterd", "filterd")
        self.children.serving(f"{self.label}-filterd", self.root / "run/filterd.sock")

    def protect(self) -> None:
        """Puts the filter in front of the image."""
        self.cli("protect", str(self.image), "--name", VOLUME, "--policy", "off", "--pool", self.pool, "--attach", "socket", "--yes")
        self.socket, self.export = Path(self.row()["nbd_socket"]), VOLUME
        self.uri = uri(self.socket, self.export)

    def status(self) -> dict:
        """The document of `status --json`; 6 is "partial": a role is missing here, on purpose or not yet up."""
        return json.loads(self.cli("status", "--json", fine=(0, 6)))

    def row(self) -> dict:
        """The volume's row of the status."""
        for row in self.status()["volumes"]:
            if row["volume"] == VOLUME:
                return row
        raise BenchError(f"{self.label}: the volume is not in the status")

    def order_lost(self) -> bool:
        """Whether the writer outran the chain and the copy loop took over."""
        return self.row()["copy_remaining"] > 0

    def close(self) -> None:
        """Ends the daemons of this side, the last started first."""
        for name in reversed(list(self.pids)):
            self.children.stop(f"{self.label}-{name}")


class Captured(_Source):
    """Capture alone: a consumer takes the descriptors and releases them without reading payload."""

    name = "capture on, records released at once"

    def __init__(self, children: Children, size: int):
        super().__init__(children, size, "captured")
        self.start_filterd()
        self.protect()
        consumer = self.children.start(
            "captured-consumer", [example("null-consumer"), self.root / "run/filterd.sock", VOLUME])
        self.pids["consumer"] = consumer
        wait_until("first copy thrown away", self.ordered, seconds=120, step=0.2)

    def ordered(self) -> bool:
        """The copy loop has nothing to do."""
        self.children.check("captured-consumer")
        return self.row()["copy_remaining"] == 0

    def settle(self) -> float:
        """Nothing to wait for: the consumer releases what it sees."""
        return time.monotonic()

    def verify(self) -> bool:
        """What is served is what the file holds."""
        return export_equals_file(self.uri, self.image, self.root)


class Replicated(_Source):
    """The whole chain: filterd, agent, target, over TLS on loopback."""

    name = "farshore"

    def __init__(self, children: Children, size: int, compression: bool = True, label: str = "replicated",
                 pool: str = POOL, agent: str = "", sparse: bool = False):
        super().__init__(children, size, label, sparse)
        self.pool = pool
        self.lag_period = 0.5
        self.tags = 0
        address = f"127.0.0.1:{free_port()}"
        self.cli("target", "init", "--data", str(self.root / "data"), "--listen", address, "--yes")
        self.daemon("target", "target", "run")
        self.children.serving(f"{label}-target", self.root / "run/target.sock")
        made = self.cli("token", "create", "--for", HOST, "--address", address, "--json")
        self.cli("enroll", json.loads(made)["token"]["token"])
        self.set_agent(agent if compression else agent + "zstd_level = 0\n")
        self.start_filterd()
        self.daemon("agent", "agent")
        self.protect()
        wait_until("first copy at the target", self.shipped, seconds=180, step=0.2)

    def set_agent(self, settings: str) -> None:
        """Settings of the agent, for this comparison."""
        config = self.root / "etc/agent.toml"
        config.parent.mkdir(exist_ok=True)
        with open(config, "a", encoding="utf-8") as text:
            text.write("\n" + settings)

    def ordered(self) -> bool:
        """In order, with nothing left to copy."""
        for name in self.pids:
            self.children.check(f"{self.label}-{name}")
        row = self.row()
        return row["copy_remaining"] == 0 and row["state"] in ("protected", "lagging")

    def shipped(self) -> bool:
        """In order, and nothing on the way."""
        return self.ordered() and self.lag_bytes() == 0

    def lag_bytes(self) -> int:
        """Bytes captured and not durable at the target."""
        return self.row()["lag_bytes"]

    def settle(self) -> float:
        """Cuts a named point behind everything written and waits until it is durable at the target."""
        self.tags += 1
        end = time.monotonic() + 180
        while True:
            try:
                self.cli("point", "tag", VOLUME, "--name", f"bench-{self.tags}")
                return time.monotonic()
            except BenchError as refused:
                # Order was lost under the load: points come back when the copy is complete.
                if time.monotonic() > end:
                    raise BenchError(f"no point can be cut: {refused}") from refused
                wait_until("order restored", self.ordered, seconds=180, step=0.1)

    def open_point(self, volume: str, point: str) -> str:
        """Opens a point for reading; returns the address of its export."""
        opened = json.loads(self.cli("failover", "test", volume, "--point", point, "--json"))
        view = opened["views"][0]
        return uri(view["nbd_socket"], view["export"])

    def verify(self) -> bool:
        """Opens the newest point and compares every byte with the source."""
        opened = self.open_point(VOLUME, f"tag:bench-{self.tags}")
        try:
            return export_equals_file(opened, self.image, self.root)
        finally:
            self.cli("failover", "cleanup", VOLUME, "--yes")
