"""Several data sets as one, each at its weight, without what any of them holds out (ours)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.data import identity
from risam_cli.data.readers.source import SampleSource
from risam_cli.files.hashing import sha256_of_file
from risam_cli.training.data.dataset import Examples, ReferringExample

_COCO = re.compile(r"(?:COCO_)?(?:train|val|test)\d{4}_(\d{12})|(\d{12})")
_ORDERS_KEPT = 16  # an epoch's draws of a member fall into a few of its passes


class MixedExamples:
    """Members drawn in turn, as often as their weights say.

    An epoch holds ``round(weight * length)`` examples of each member. A member goes through its
    own items in shuffled passes that run on from epoch to epoch, so that at any weight every item
    is seen as often as any other, give or take one.

    Args:
        members: not empty; weights: above 0, one each; seed: of the shuffling.
    """

    def __init__(self, members: Sequence[Examples], weights: Sequence[float], seed: int) -> None:
        self.members = list(members)
        self.seed = seed
        self.shares = [
            max(1, round(weight * len(member)))
            for member, weight in zip(members, weights, strict=True)
        ]
        self._starts = np.cumsum([0, *self.shares])
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def expressions_of(self, index: int) -> int:
        """Of the member's example."""
        member, inner = self.place(index)
        return self.members[member].expressions_of(inner)

    def name_of(self, index: int) -> str:
        """Of the member's example."""
        member, inner = self.place(index)
        return self.members[member].name_of(inner)

    def __getitem__(self, index: int) -> ReferringExample:
        member, inner = self.place(index)
        return self.members[member][inner]

    def place(self, index: int) -> tuple[int, int]:
        """Which member an index falls to, and the member's own index."""
        epoch, item = divmod(index, len(self))
        number = int(np.searchsorted(self._starts, item, side="right")) - 1
        drawn = epoch * self.shares[number] + item - int(self._starts[number])
        size = len(self.members[number])
        turn, place = divmod(drawn, size)
        return number, turn * size + int(self._order(number, turn)[place])

    def _order(self, number: int, turn: int) -> NDArray[np.int64]:
        key = number, turn
        if key not in self._orders:
            if len(self._orders) >= _ORDERS_KEPT:
                self._orders.clear()
            rng = np.random.default_rng([self.seed, number, turn])
            self._orders[key] = rng.permutation(len(self.members[number]))
        return self._orders[key]


def image_key(path: Path | str) -> str:
    """What tells an image apart across data sets: COCO's own number, or else where its file is.

    Links are followed, and names are compared as :mod:`risam_cli.data.identity` says.
    """
    found = _COCO.fullmatch(Path(path).stem)
    if found:
        return f"coco/{int(found[1] or found[2])}"
    return identity.image_key(os.path.realpath(path))


def copies_of(paths: Iterable[Path], originals: Iterable[Path]) -> dict[Path, Path]:
    """Those of ``paths`` that are byte for byte one of ``originals``, whatever they are called.

    Only files of one length are read, so it costs about a look at each file; where all are of one
    length, as uncompressed ones are, it costs what an epoch reads. Missing files have no copies.
    """
    by_length: dict[int, list[Path]] = {}
    for original in dict.fromkeys(originals):
        with suppress(OSError):
            by_length.setdefault(original.stat().st_size, []).append(original)
    hashed: dict[int, dict[str, Path]] = {}
    found = {}
    for path in dict.fromkeys(paths):
        with suppress(OSError):
            length = path.stat().st_size
            if length not in by_length:
                continue
            if length not in hashed:
                hashed[length] = {sha256_of_file(one): one for one in by_length[length]}
            if original_of := hashed[length].get(sha256_of_file(path)):
                found[path] = original_of
    return found


def without_images(
    source: SampleSource, held_out: Collection[str], aliases: Mapping[str, str] | None = None
) -> tuple[SampleSource, int, int]:
    """The source without the images whose keys are held out; how many they are, and expressions.

    Args:
        source: unlimited; held_out: of :func:`image_key`.
        aliases: gives some keys another name, such as COCO's number.
    """
    kept, images, expressions = [], 0, 0
    for index in source.order if source.order is not None else range(len(source.groups)):
        group = source.groups[index]
        key = image_key(group.path)
        if (aliases or {}).get(key, key) in held_out:
            images += 1
            expressions += len(group.phrases)
        else:
            kept.append(index)
    return replace(source, order=tuple(kept)), images, expressions
