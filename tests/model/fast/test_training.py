"""Forms for training on a CPU learn what the plain equations learn."""

from __future__ import annotations

import pytest
import torch
from support.networks import (
    SWITCHES,
    WITH_STEM,
    features,
    in_double,
    noise,
    relative_error,
    small_model,
)
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.fast.prepare import prepare_for_training, take_plain_forms
from risam_cli.model.fast.training import TrainedRisam, layer_norm
from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.text_encoder import TextFeatures

ON_CPU = torch.device("cpu")


@pytest.mark.parametrize("stem", [False, True])
def test_a_whole_network_gives_the_same_answers_and_gradients(stem: bool) -> None:
    model = in_double(small_model(**(WITH_STEM if stem else {}))[0])
    plain = _learned(model)
    prepare_for_training(model, ON_CPU)
    kinds = {type(part).__name__ for part in model.modules()}
    assert {
        "TrainedRisam",
        "TrainedAttention",
        "TrainedLayerNorm",
        "TrainedLayerNorm2d",
        "TrainedTextEncoder",
    } <= kinds
    trained = _learned(model)
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        difference = (gradient - trained.get(name, torch.zeros(()))).abs().max()
        assert float(difference) < 1e-10 * scale, name
    take_plain_forms(model)
    assert not [part for part in model.modules() if type(part).__name__.startswith("Trained")]


def test_on_other_devices_all_stays_and_of_other_networks_the_decoder() -> None:
    model, _ = small_model()
    prepare_for_training(model, torch.device("cuda"))
    assert not [part for part in model.modules() if type(part).__name__.startswith("Trained")]
    other, _ = small_model(kind="cris")
    prepare_for_training(other, ON_CPU)
    assert type(other) is Risam


def _learned(model: Risam) -> dict[str, Tensor]:
    """Gradients of a made-up loss, and the mask's logits among them."""
    model.zero_grad()
    ids = torch.randint(1, 30, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None]).long()
    pixels = noise(2, 3, 64, 64).double()
    decoded = model(pixels, ids, mask, torch.tensor([1, 0, 1]))
    logits = decoded.mask_logits
    ((logits * noise(*logits.shape, seed=2)).mean() + decoded.iou.sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"mask": logits.detach(), **gradients}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_in_training(switch: str) -> None:
    model = in_double(small_model(**SWITCHES[switch])[0])
    image, text = features(model, (4, 4), 2, [3, 5, 1, 2])
    expected, wanted = _decoded(model, image, text, [1, 0, 1, 1])
    prepare_for_training(model, ON_CPU)
    assert type(model) is TrainedRisam
    found, learned = _decoded(model, image, text, [1, 0, 1, 1])
    for name in ("mask_logits", "iou", "no_target_logits"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-10, name
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # What adds the same to all regions' logits has no part in a softmax over regions.
        difference = gradient - learned.get(name, torch.zeros(()))
        assert float(difference.abs().max()) < 1e-10 * scale, name


def test_many_words_are_trained_on_by_the_plain_equations() -> None:
    model = in_double(small_model()[0])
    image, text = features(model, (4, 4), 1, [8, 3])  # 2 heads of 9 tokens, and 16 channels
    expected, _ = _decoded(model, image, text, [0, 0])
    prepare_for_training(model, ON_CPU)
    found, _ = _decoded(model, image, text, [0, 0])
    assert torch.equal(found.mask_logits, expected.mask_logits)


def _decoded(
    model: Risam, image: ImageFeatures, text: TextFeatures, owner: list[int]
) -> tuple[Decoded, dict[str, Tensor]]:
    """The answers, and the gradients of all that a made-up loss on them depends on."""
    visual, words = image.visual.clone().requires_grad_(), text.words.clone().requires_grad_()
    fine = None if image.fine is None else image.fine.clone().requires_grad_()
    image, text = ImageFeatures(visual, fine), TextFeatures(words, text.valid, text.sentence)
    model.zero_grad()
    decoded = model.decode(image, text, torch.tensor(owner))
    parts = (decoded.mask_logits, decoded.iou, decoded.no_target_logits)
    sum((part * noise(*part.shape, seed=9)).sum() for part in parts).backward()
    leaves = {"visual": visual, "words": words, "fine": fine, **dict(model.named_parameters())}
    return decoded, {n: p.grad for n, p in leaves.items() if p is not None and p.grad is not None}


def test_norms_learn_from_every_row_in_bfloat16() -> None:
    rows = 65536
    x, grad = noise(rows, 8), noise(rows, 8, seed=1) + 0.05
    weight, bias = 1 + 0.1 * noise(8, seed=2), noise(8, seed=3)
    found = _norm_gradients(layer_norm, x.bfloat16(), weight, bias, grad.bfloat16())
    expected = _norm_gradients(_plain_norm, x, weight, bias, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.float(), theirs) < 0.02


def test_norms_compute_what_pytorch_computes() -> None:
    x, weight, bias = noise(2, 3, 8).bfloat16(), 1 + noise(8, seed=2), noise(8, seed=3)
    assert torch.equal(layer_norm(x, weight, bias, 1e-6), _plain_norm(x, weight, bias, 1e-6))


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _norm_gradients(
    norm: object, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (x, weight, bias)]
    assert callable(norm)
    norm(*leaves, 1e-6).backward(grad)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]
