"""Interleaved pairs and the ratios made of them.

Owns: the order of runs (A-B-B-A) and the arithmetic. Never: what a run is.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ratio:
    """Median of the pairwise ratios with their range."""

    median: float
    low: float
    high: float
    pairs: int

    @staticmethod
    def of(ratios: list[float]) -> "Ratio":
        """At least one ratio."""
        return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


@dataclass
class Paired:
    """The figures of both sides of every pair, in order."""

    ours: list[dict] = field(default_factory=list)
    base: list[dict] = field(default_factory=list)

    def ratio(self, key: str) -> Ratio:
        """Ours divided by the baseline beside it. A pair without a figure for it is an error."""
        return Ratio.of([o[key] / b[key] for o, b in zip(self.ours, self.base, strict=True)])

    def median(self, side: str, key: str) -> Ratio:
        """Median and range of one side's own figure (noisy: for reading, not for judging)."""
        return Ratio.of([run[key] for run in getattr(self, side)])


def interleave(pairs: int, ours: Callable[[], dict], base: Callable[[], dict]) -> Paired:
    """Runs `pairs` pairs in the order A-B-B-A-A-B-B-A…, so that a drifting machine hits both."""
    result = Paired()
    for pair in range(pairs):
        if pair % 2 == 0:
            result.ours.append(ours())
            result.base.append(base())
        else:
            result.base.append(base())
            result.ours.append(ours())
    return result
