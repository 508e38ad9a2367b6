"""Words that a model does not know: told once each, and again where they make up most of a run."""

from __future__ import annotations

from collections.abc import Iterable

from risam_cli.console.console import get_console
from risam_cli.console.text import counted
from risam_cli.segmenters.names import KNOWN
from risam_cli.types import Prediction

_SHOWN = 5  # words told one by one; later ones are counted
FOR_PHOTOS = next(iter(KNOWN))


class UnknownWords:
    """Collects the unknown words of a run and tells of them on the console.

    Args:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._words: dict[str, None] = {}
        self._records = 0
        self._affected = 0

    def note(self, words: Iterable[str]) -> list[str]:
        """Counts one record with the words of it that are not known; gives those that are new."""
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        self._records += 1
        self._affected += bool(words)
        self._words |= dict.fromkeys(new)
        return new

    def see(self, predictions: Iterable[Prediction]) -> None:
        """Takes note of records; tells of each new word, of the first few one by one."""
        for one in predictions:
            if one.instance:  # its expression was counted with the first instance
                continue
            before = len(self._words)
            for word in self.note(one.unknown_words)[: max(0, _SHOWN - before)]:
                get_console().warn(f"the model {self._name} does not know the word {word!r}")

    def summary(self) -> str:
        """What they come to, in a line; empty where every word was known."""
        if not self._affected:
            return ""
        words = counted(len(self._words), "word")
        asked = counted(self._records, "expression")
        has = "has" if self._affected == 1 else "have"
        text = f"{self._affected} of {asked} {has} words unknown to {self._name}"
        if 2 * self._affected >= self._records:
            text += (
                f"; their masks mean little: for photos name a model that knows such words, such "
                f"as {FOR_PHOTOS}"
            )
        return f"{text} ({words} in all)"

    def named(self) -> str:
        """The first few of them."""
        some = ", ".join(repr(word) for word in list(self._words)[:_SHOWN])
        return some + (", …" if len(self._words) > _SHOWN else "")

    def tell(self) -> None:
        """Sums up, at the end; nothing where every word was known."""
        if text := self.summary():
            get_console().warn(text)
