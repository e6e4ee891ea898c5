"""The form of a result: a table on stdout and .build/bench/NAME.json.

Owns: machine description, rows, goals' marks. A missed goal is a figure, never an error.
"""

import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from lib.pairs import Ratio

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict:
    """What the figures were taken on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "memory_gib": round(int(memory) / (1 << 20), 1),
        "kernel": platform.release(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str:
    """The commit measured; `+` marks uncommitted changes."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "") if head else "unknown"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass
class Report:
    """Rows of one benchmark."""

    bench: str
    command: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict = field(default_factory=dict)
    machine: dict = field(default_factory=machine)
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def ratio(
        self, goal: str, case: str, ratio: Ratio, must: float | None, moonshot: float | None,
        at_least: bool, verified: bool, detail: str = "",
    ) -> None:  # fmt: skip
        """A ratio held against a goal. `at_least`: larger is better. `must` None: no goal is set."""
        met = None if must is None else (ratio.median >= must if at_least else ratio.median <= must)
        self.rows.append(
            {
                "goal": goal, "case": case, "unit": "ratio", "median": round(ratio.median, 4),
                "min": round(ratio.low, 4), "max": round(ratio.high, 4), "pairs": ratio.pairs,
                "must": must, "moonshot": moonshot, "met": met, "verified": verified, "detail": detail,
            }
        )  # fmt: skip

    def figure(self, goal: str, case: str, unit: str, figure: Ratio, verified: bool, detail: str = "") -> None:
        """A plain figure, for reading only: absolute values swing with the machine."""
        self.rows.append(
            {
                "goal": goal, "case": case, "unit": unit, "median": round(figure.median, 4),
                "min": round(figure.low, 4), "max": round(figure.high, 4), "pairs": figure.pairs,
                "must": None, "moonshot": None, "met": None, "verified": verified, "detail": detail,
            }
        )  # fmt: skip

    def note(self, text: str) -> None:
        """A remark that belongs to the figures; printed now and kept."""
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def finish(self) -> None:
        """Writes the JSON file and prints the table."""
        path = ROOT / ".build/bench" / f"{self.bench}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "bench": self.bench,
            "machine": self.machine,
            "commit": commit(),
            "date": self.started,
            "command": self.command,
            "results": self.rows,
            "notes": self.notes,
            "raw": self.raw,
        }
        path.write_text(json.dumps(whole, indent=1) + "\n")
        print(f"\n{self.bench}: {self.machine['cores']} x {self.machine['cpu']}, kernel {self.machine['kernel']}, "
              f"load before {self.machine['load_before'][0]}, commit {whole['commit']}, {self.started}")
        print(table(self.rows))
        print(f"\nraw: {path.relative_to(ROOT)}")


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, so that it can be kept as printed."""
    lines = ["| goal | case | figure | must | met | verified | detail |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        digits = 2 if row["unit"] == "ratio" else 1
        figure = f"{row['median']:.{digits}f} ({row['min']:.{digits}f}..{row['max']:.{digits}f})"
        unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
        met = {None: "-", True: "yes", False: "NO"}[row["met"]]
        must = "-" if row["must"] is None else f"{row['must']:g}"
        proof = "yes" if row["verified"] else "NO"
        lines.append(f"| {row['goal']} | {row['case']} | {figure}{unit} | {must} | {met} | {proof} | {row['detail']} |")
    return "\n".join(lines)
