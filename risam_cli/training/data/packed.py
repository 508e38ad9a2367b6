"""Samples in one block of bytes: light, and shared by worker processes without being copied.

A list of a hundred thousand Python objects is copied page by page into every worker that looks at
it, because looking counts references. Bytes are not.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from risam_cli.errors import DataError
from risam_cli.types import Expression, Sample


class PackedSamples(Sequence[Sample]):
    """Samples with known masks, packed; expressions that share a mask share its bytes.

    Args:
        samples: drawn here, so that a damaged annotation is told of before anything is trained.

    Raises:
        DataError: an expression without ground truth, or whatever drawing a sample raises.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        block, ends, counts = bytearray(), array("q"), array("q")
        for sample in samples:
            if not sample.expressions:
                continue
            for expression in sample.expressions:
                if expression.target is None:
                    raise DataError(
                        f"expression {expression.id!r} of {sample.image} has no mask to learn from",
                        "give it ann_ids",
                    )
            counts.append(len(sample.expressions))
            block += pickle.dumps(_lean(sample), protocol=5)
            ends.append(len(block))
        self._block = np.frombuffer(bytes(block), np.uint8)
        self._ends = np.asarray(ends, np.int64)
        self._counts = np.asarray(counts, np.int64)

    @property
    def expressions(self) -> int:
        """Of all samples together."""
        return int(self._counts.sum())

    def expressions_of(self, index: int) -> int:
        """Of one sample, without unpacking it."""
        return int(self._counts[index])

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def nbytes(self) -> int:
        """Size of the block and its indices in bytes."""
        return self._block.nbytes + self._ends.nbytes + self._counts.nbytes

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        # Only what this class has packed itself is unpickled.
        sample: Sample = pickle.loads(self._block[start : int(self._ends[index])].tobytes())
        return sample


def _lean(sample: Sample) -> Sample:
    """Without what only evaluation looks at."""
    kept = tuple(Expression(e.id, e.text, e.target, e.no_target) for e in sample.expressions)
    return Sample(sample.image, sample.path, kept, sample.size)
