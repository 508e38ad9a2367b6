"""The products of the fast path: what chooses them."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from support.paths import REPO

from risam_cli.model.fast import linear


def test_the_kernel_is_tried_alike_within_autocast() -> None:
    expected = linear.has_fast_products(torch.float32)
    linear._onednn.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear.has_fast_products(torch.float32)
    assert found == expected


NARROW = """
import torch
from risam_cli.model.fast.attention import choose_way
from risam_cli.model.fast.linear import has_fast_products, linear
assert not has_fast_products(torch.bfloat16)
with torch.inference_mode():
    x, weight = torch.linspace(-2, 2, 48).view(6, 8), torch.linspace(1, -1, 40).view(5, 8)
    found = linear(x, weight.bfloat16())
    torch.testing.assert_close(found.float(), x @ weight.T, atol=0.1, rtol=0.02)
    assert choose_way(torch.zeros(1, 2, 1024, 32).bfloat16(), 32, 32) == "biased"
"""


def test_a_processor_without_bf16_products_takes_pytorch_s() -> None:
    """oneDNN has them from AVX-512 on; here it is told that this processor ends at AVX2."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", NARROW], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
