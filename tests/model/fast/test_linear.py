"""The products of the fast path: what chooses them."""

from __future__ import annotations

import torch

from risam_cli.model.fast import linear


def test_the_kernel_is_tried_alike_within_autocast() -> None:
    expected = linear.has_fast_products()
    linear._onednn.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear.has_fast_products()
    assert found == expected
