"""Which part of the inputs a process takes, so that many processes cover a set together."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from risam_cli.data.inputs.inputs import Entry
from risam_cli.errors import UsageError, setting

# What an image costs, in thousandths of encoding it: see docs/scale.md for the measurement.
_IMAGE = 1000
_EXPRESSION = 120
_MEGAPIXEL = 60  # of reading the image, and again of each mask
_USUAL = 307_200  # pixels of an image whose size the listing does not tell: 640x480


def cost_of(expressions: int, size: tuple[int, int] | None, *, first: bool = True) -> int:
    """What an image with so many expressions costs, in thousandths of encoding it (ours).

    Args:
        size: (H, W) where the listing tells it; images are not looked at for it, so that every
            process comes to the same number.
        first: whether the image is encoded for them, or was for others of its expressions.
    """
    pixels = _USUAL if size is None else size[0] * size[1]
    a_look = _MEGAPIXEL * pixels // 1_000_000
    return (_IMAGE + a_look if first else 0) + expressions * (_EXPRESSION + a_look)


class Dealer:
    """Deals work to N hands in the order in which it comes, each time to the one with the least.

    What is dealt depends on the costs alone, so N processes that see the same list agree without a
    word. No hand has more than the mean and one piece; equal costs go round in turn.
    """

    def __init__(self, count: int) -> None:
        self._loads = [(0, index) for index in range(1, count)]  # a heap, without the hand dealt to
        self._load, self.hand = 0, 0

    def deal(self, cost: int) -> int:
        """The hand that takes the next piece."""
        self._load, self.hand = heapq.heappushpop(self._loads, (self._load, self.hand))
        self._load += cost
        return self.hand

    def add(self, cost: int) -> None:
        """More of the piece that was dealt last."""
        self._load += cost


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``; the parts of one run share nothing and miss nothing."""

    index: int = 0
    count: int = 1

    def own(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """This part's of all entries. Stretches of one image stay together; parts cost alike."""
        return filter(self.picks(), entries)

    def picks(self) -> Callable[[Entry], bool]:
        """What says, asked of all entries one after another, whether each is this part's."""
        if self.count == 1:
            return lambda entry: True
        dealer, run = Dealer(self.count), -1

        def is_own(entry: Entry) -> bool:
            nonlocal run
            size = None if entry.sample is None else entry.sample.size
            if entry.run != run:
                run = entry.run
                dealer.deal(cost_of(entry.size, size))
            else:
                dealer.add(cost_of(entry.size, size, first=False))
            return dealer.hand == self.index

        return is_own

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
