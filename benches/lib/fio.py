"""fio as a client of an NBD server.

Owns: the command line and the reading of fio's JSON. Never: judging the figures.
"""

import json

from lib.procs import BenchError, run


def uri(socket: object, export: str = "") -> str:
    """NBD URI of a unix socket."""
    return f"nbd+unix:///{export}?socket={socket}"


def load(where: str, rw: str, bs: str, qd: int, seconds: float, size: int, extra: list[str] | None = None) -> dict:
    """One timed run. Returns iops, ios, bytes, seconds, p50_us, p99_us (completion latency)."""
    done = run(
        [
            "fio", "--name=load", "--ioengine=nbd", f"--uri={where}", f"--rw={rw}", f"--bs={bs}",
            f"--iodepth={qd}", f"--size={size}", "--time_based", f"--runtime={int(seconds * 1000)}ms",
            "--norandommap", "--randrepeat=0", "--output-format=json", *(extra or []),
        ],
        seconds=seconds + 60,
    )  # fmt: skip
    return parse(done, "read" if "read" in rw else "write")


def parse(output: str, side: str) -> dict:
    """Figures of fio's JSON; fio may print notes before it."""
    try:
        job = json.loads(output[output.index("{"):])["jobs"][0]
    except (ValueError, KeyError, IndexError) as bad:
        raise BenchError(f"cannot read fio's output: {bad}\n{output[-1000:]}") from bad
    if job["error"] != 0:
        raise BenchError(f"fio reports error {job['error']}")
    part = job[side]
    if part["total_ios"] == 0:
        raise BenchError("fio did no I/O")
    percentiles = part["clat_ns"]["percentile"]
    return {
        "iops": part["iops"],
        "ios": part["total_ios"],
        "bytes": part["io_bytes"],
        "seconds": part["runtime"] / 1000.0,
        "p50_us": percentiles["50.000000"] / 1000.0,
        "p99_us": percentiles["99.000000"] / 1000.0,
    }


def write_and_verify(where: str, size: int) -> None:
    """Writes random blocks with checksums inside and reads all of them back; a mismatch raises."""
    run(
        [
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={where}", "--rw=randwrite", "--bs=4k",
            "--iodepth=16", f"--size={size}", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
            "--randrepeat=0", "--output-format=json",
        ]
    )  # fmt: skip
