"""Counts how often names were seen, in a few bytes a name."""

from __future__ import annotations

from array import array

from risam_cli.files.hashing import hash64


class NameCounts:
    """How often each of many names was seen.

    Names are kept as 64 bits of a hash: 12 bytes each at up to two thirds full, against some 150
    for a set of strings. Among a million names the chance of one mistaken for another is 3e-8.
    """

    def __init__(self) -> None:
        self._grow(1 << 10)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def add(self, name: str) -> int:
        """Counts one more of a name; gives how many there were before."""
        key = hash64(name) or 1  # 0 marks an empty place
        place = self._find(key)
        before = self._counts[place]
        if before == 0:
            self._keys[place] = key
            self._used += 1
        self._counts[place] = before + 1
        if before == 0 and 3 * self._used > 2 * len(self._keys):
            self._rehash()
        return before

    def _find(self, key: int) -> int:
        last = len(self._keys) - 1
        place = key & last
        while self._keys[place] not in (0, key):
            place = (place + 1) & last
        return place

    def _grow(self, size: int) -> None:
        self._keys = array("Q", bytes(8 * size))
        self._counts = array("I", bytes(4 * size))

    def _rehash(self) -> None:
        keys, counts = self._keys, self._counts
        self._grow(2 * len(keys))
        for key, count in zip(keys, counts, strict=True):
            if key:
                place = self._find(key)
                self._keys[place] = key
                self._counts[place] = count
