"""CPU seconds of processes, as the kernel accounts them.

Owns: reading /proc. Never: starting or stopping anything.
"""

import contextlib
import os

TICKS = os.sysconf("SC_CLK_TCK")


def process_cpu(pid: int) -> float:
    """User + system seconds of a process: every thread, exited ones and reaped children included.

    /proc/PID/stat sums the whole thread group, and the kernel scales the two figures so that
    their sum is the scheduler's exact run time; the only rounding is to one tick (10 ms).
    """
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    utime, stime, cutime, cstime = (int(field) for field in fields[11:15])
    return (utime + stime + cutime + cstime) / TICKS


class Chain:
    """The processes whose CPU is charged to one side of a comparison."""

    def __init__(self, pids: dict[str, int]):
        self.pids = dict(pids)
        self.start = {name: 0.0 for name in self.pids}

    def pin(self, core: int | None) -> None:
        """Keeps all threads, and those they start from now on, on one core; None lets them go."""
        cores = {core} if core is not None else os.sched_getaffinity(0)
        for pid in self.pids.values():
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task), cores)

    def begin(self) -> None:
        """Remembers the present readings."""
        self.start = {name: process_cpu(pid) for name, pid in self.pids.items()}

    def spent(self) -> dict[str, float]:
        """Seconds since `begin`, by process; a vanished process makes the run invalid."""
        return {name: process_cpu(pid) - self.start[name] for name, pid in self.pids.items()}
