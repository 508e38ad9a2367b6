"""Samples for the pipeline, each with its number as what it carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from risam_cli.inference.finish import ImageResult
from risam_cli.types import Sample


def numbered(samples: Iterable[Sample]) -> Iterator[tuple[Sample, int]]:
    """Each sample with its number in the source."""
    return ((sample, number) for number, sample in enumerate(samples))


def in_order(found: Iterable[tuple[int, ImageResult]]) -> list[ImageResult]:
    """The results of :func:`numbered` samples; none may be missing, doubled or out of place."""
    results = []
    for place, (number, result) in enumerate(found):
        assert number == place
        results.append(result)
    return results
