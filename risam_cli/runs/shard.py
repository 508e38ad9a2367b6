"""Which part of the inputs a process takes, so that many processes cover a set together."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import UsageError, setting


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``; the parts of one run share nothing and miss nothing."""

    index: int = 0
    count: int = 1

    def has(self, entry: Entry) -> bool:
        """Whether an entry is this part's: stretches of one image are dealt out in turn."""
        return entry.run % self.count == self.index

    def folder(self, output: Path) -> Path:
        """This part's own folder under one that all parts are given."""
        return output / f"shard-{self.index:05d}-of-{self.count:05d}"


def parse_shard(text: str) -> Shard:
    """``I/N`` as a shard. I counts from 0; N is taken as 0, so counting from 1 covers all as well.

    Raises:
        UsageError: it is not of this form, or I is greater than N.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if count < 1 or index > count:
        raise UsageError(
            f"{setting('shard')} {text!r} is not I/N with I from 0 to N", "write 0/4, 1/4, …"
        )
    return Shard(index % count, count)


def shard_of_environment(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The shard that torchrun gives this process by RANK and WORLD_SIZE; None without torchrun."""
    rank, size = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    if not rank.isdigit() or not size.isdigit() or int(size) < 2:
        return None
    return Shard(int(rank) % int(size), int(size))
