"""Feature Enhancement: three depths in, one out."""

from __future__ import annotations

import pytest
import torch
from support.networks import noise, randomize
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.feature_enhancement import FeatureEnhancement


def _levels() -> tuple[Tensor, Tensor, Tensor]:
    return noise(2, 12, 3, 5, seed=1), noise(2, 12, 3, 5, seed=2), noise(2, 8, 3, 5, seed=3)


@torch.no_grad()
def test_it_is_the_sum_that_its_docstring_tells() -> None:
    ours = randomize(FeatureEnhancement(12, 8, 16))
    levels = _levels()
    projected = []
    for part, x in zip((ours.shallow, ours.middle, ours.deep), levels, strict=True):
        convolution, norm = part
        y = torch.einsum("oc,bchw->bhwo", convolution.weight[:, :, 0, 0], x) + convolution.bias
        y = F.layer_norm(y, (16,), norm.weight, norm.bias, 1e-6)
        projected.append(y.permute(0, 3, 1, 2))
    x = projected[2] + ours.mix(torch.cat(projected, dim=1))
    x = F.layer_norm(x.permute(0, 2, 3, 1), (16,), ours.norm.weight, ours.norm.bias, 1e-6)
    assert torch.allclose(ours(*levels), x.permute(0, 3, 1, 2), atol=1e-5)


@torch.no_grad()
def test_every_depth_matters_and_in_the_ablation_the_deep_one_alone() -> None:
    full = randomize(FeatureEnhancement(12, 8, 16))
    deep_only = randomize(FeatureEnhancement(12, 8, 16, enabled=False))
    assert {name.split(".")[0] for name in deep_only.state_dict()} == {"deep", "norm"}
    levels = _levels()
    for number in range(3):
        changed = [x + (i == number) for i, x in enumerate(levels)]
        moved = (full(*changed) - full(*levels)).abs().max()
        assert moved > 0.05
        moved = (deep_only(*changed) - deep_only(*levels)).abs().max()
        assert (moved > 0.05) == (number == 2)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    ours = randomize(FeatureEnhancement(12, 8, 16))
    shallow, middle, deep = _levels()
    alone = ours(shallow[1:], middle[1:], deep[1:])
    assert torch.allclose(ours(shallow, middle, deep)[1:], alone, atol=1e-6)


@pytest.mark.parametrize("sides", [(6, 10), (2, 3)])
@torch.no_grad()
def test_levels_of_other_strides_come_to_the_deep_grid(sides: tuple[int, int]) -> None:
    ours = randomize(FeatureEnhancement(12, 8, 16))
    _, middle, deep = _levels()
    shallow = noise(2, 12, *sides)
    assert ours(shallow, middle, deep).shape == (2, 16, 3, 5)
    # A level that says the same everywhere says so at every stride.
    flat = noise(2, 12, 1, 1)
    coarse, fine = flat.expand(2, 12, *sides), flat.expand(2, 12, 3, 5)
    assert torch.allclose(ours(coarse, middle, deep), ours(fine, middle, deep), atol=1e-5)
