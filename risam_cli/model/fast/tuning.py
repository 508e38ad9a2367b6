"""What suits one processor and not another: chosen by measurement, for this process (ours).

``risam doctor`` measures and keeps it (:mod:`risam_cli.inference.calibration`); without that all
goes by the defaults here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Product = Literal["onednn", "torch"]
"""The kernel of large products: oneDNN's own operator, or ``torch.nn.functional.linear``."""

PRODUCTS: tuple[Product, ...] = ("onednn", "torch")


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices for the CPU.

    Attributes:
        products: by number format; results of the two kernels differ by rounding alone.
        tile: tokens that go through the image encoder's blocks at a time; changes no result beyond
            rounding.
    """

    products: Mapping[torch.dtype, Product] = field(default_factory=dict)
    tile: int = 768

    def product(self, dtype: torch.dtype) -> Product:
        """The kernel of a number format: oneDNN's where nothing was measured."""
        return self.products.get(dtype, "onednn")


DEFAULT = Tuning()
_in_use = DEFAULT


def in_use() -> Tuning:
    """The choices that the network goes by."""
    return _in_use


def use(tuning: Tuning) -> None:
    """Has the networks of this process go by other choices from now on."""
    global _in_use
    _in_use = tuning
