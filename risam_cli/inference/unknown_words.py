"""Words that a model does not know: told once each, and again where they make up most of a run."""

from __future__ import annotations

from collections.abc import Iterable

from risam_cli.console.console import get_console
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
        self._words: set[str] = set()
        self._records = 0
        self._affected = 0

    def see(self, predictions: Iterable[Prediction]) -> None:
        """Takes note of records; tells of each new word, of the first few one by one."""
        for one in predictions:
            self._records += 1
            self._affected += bool(one.unknown_words)
            for word in one.unknown_words:
                if word in self._words:
                    continue
                self._words.add(word)
                if len(self._words) <= _SHOWN:
                    get_console().warn(f"the model {self._name} does not know the word {word!r}")

    def tell(self) -> None:
        """Sums up, at the end; nothing where every word was known."""
        if not self._affected:
            return
        words = f"{len(self._words)} word{'' if len(self._words) == 1 else 's'}"
        text = f"{self._affected} of {self._records} expressions have words unknown to {self._name}"
        if 2 * self._affected >= self._records:
            text += (
                f"; their masks mean little: for photos name a model that knows such words, such "
                f"as {FOR_PHOTOS}"
            )
        get_console().warn(f"{text} ({words} in all)")
