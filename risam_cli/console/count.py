"""Counts of a run under way: rate, time left, and what keeps it busy."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from risam_cli.console.text import sanitize

STALLED = 30.0
"""Seconds without progress after which it is said that there is none."""


_RATE_WINDOW = 30.0  # seconds over which the rate is taken, so that it follows a change of load


class Count:
    """The numbers behind a progress display; see :meth:`Console.progress` for the arguments."""

    def __init__(self, total: int | None, unit: str, clock: Callable[[], float], done: int) -> None:
        self.total, self.unit, self.clock = total, unit, clock
        self.done = self.begun_with = done
        self.fields: dict[str, object] = {}
        self.lock = threading.RLock()
        self.started = clock()
        self.advanced = self.started
        self._recent: deque[tuple[float, int]] = deque([(self.started, done)])

    def add(self, n: int, fields: Mapping[str, Any]) -> None:
        """Count ``n`` more items at this moment."""
        self.advanced = now = self.clock()
        self.done += n
        self.fields.update(fields)
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] < now - _RATE_WINDOW:
            self._recent.popleft()

    def text(self, *, final: bool = False) -> str:
        """Count, rate and time left (over all of the time where ``final``), then the fields."""
        then, before = (self.started, self.begun_with) if final else self._recent[0]
        now = self.clock()
        rate = (self.done - before) / (now - then) if now > then else 0.0
        known = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.done}{known} {self.unit}"]
        if rate > 0:
            parts.append(f"{rate:.3g} {self.unit}/s" if rate < 100 else f"{rate:.0f} {self.unit}/s")
        if final:
            parts.append(f"took {_duration(now - self.started)}")
        elif rate > 0 and self.total is not None:
            parts.append(f"{_duration(max(self.total - self.done, 0) / rate)} left")
        if not final and now - self.advanced >= STALLED:
            parts.append(f"nothing for {_duration(now - self.advanced)}")
        parts += [
            f"{name}={_value(value)}"
            for name, value in self.fields.items()
            if not isinstance(value, Mapping)
        ]
        return ", ".join(parts)

    def shares(self) -> str:
        """Where the time goes, as far as it was told; else empty."""
        told = [
            f"{name}: {_shares(value)}"
            for name, value in self.fields.items()
            if isinstance(value, Mapping) and sum(value.values()) > 0
        ]
        return "; ".join(told)

    def line(self, *, final: bool = False) -> str:
        """All of it."""
        return "; ".join(filter(None, (self.text(final=final), self.shares())))


def _duration(seconds: float) -> str:
    """Seconds as ``8s``, ``3m05s`` or ``2h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _shares(seconds: Mapping[str, float]) -> str:
    """The parts' shares of their sum, the largest first, without those under half a percent."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {part / total:.0%}" for name, part in ordered if part / total >= 5e-3)


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else sanitize(str(value))
