"""How often images go through an encoder, whichever of its forms it has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from risam_cli.model.fast.encoder import HostImageEncoder
from risam_cli.model.image_encoder import EncoderFeatures, ImageEncoder


def count_encodes(
    monkeypatch: pytest.MonkeyPatch, counts: Callable[[], bool] = lambda: True
) -> list[int]:
    """Sizes of the batches that go through any image encoder from now on, while it counts."""
    seen: list[int] = []

    def count(kind: type[ImageEncoder]) -> None:
        forward = kind.forward

        def counted(self: ImageEncoder, pixels: torch.Tensor) -> EncoderFeatures:
            if counts():
                seen.append(len(pixels))
            return forward(self, pixels)

        monkeypatch.setattr(kind, "forward", counted)

    count(ImageEncoder)
    count(HostImageEncoder)
    return seen
