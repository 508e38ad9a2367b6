"""Losses against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from support.networks import noise
from torch import Tensor

from risam_cli.metrics.figures import summarize
from risam_cli.model.mask_decoder import Decoded
from risam_cli.training.data.collate import ReferringBatch
from risam_cli.training.losses import DenseOutput, LossParts, ReferringLoss, dense_loss
from risam_cli.training.validate import _scores

LOG2 = math.log(2)


def _loss(
    gamma: float = 0.0, weights: tuple[float, float, float, float] = (1, 1, 1, 1)
) -> ReferringLoss:
    return ReferringLoss(*weights, focal_gamma=gamma)


def _parts(
    logits: Tensor,
    target: Tensor,
    *,
    valid: Tensor | None = None,
    no_target: Tensor | None = None,
    iou: Tensor | None = None,
    none_logits: Tensor | None = None,
    loss: ReferringLoss | None = None,
) -> LossParts:
    count = len(logits)
    decoded = Decoded(
        logits,
        torch.full((count,), 0.5) if iou is None else iou,
        torch.zeros(count) if none_logits is None else none_logits,
    )
    valid = torch.ones_like(target) if valid is None else valid
    no_target = torch.zeros(count) if no_target is None else no_target
    parts: LossParts = (loss or _loss())(decoded, target, valid, no_target)
    return parts


def _half(count: int = 1) -> Tensor:
    """4x4 targets, the left half full."""
    target = torch.zeros(count, 4, 4)
    target[:, :, :2] = 1
    return target


def test_a_case_by_hand() -> None:
    """Logits 0 everywhere: probability 1/2 on 16 cells, of which 8 are the target's."""
    parts = _parts(torch.zeros(1, 4, 4), _half())
    assert parts.mask.item() == pytest.approx(LOG2)
    # overlap 4, sizes 8 + 8, one added to both for smoothness.
    assert parts.dice.item() == pytest.approx(1 - (2 * 4 + 1) / (8 + 8 + 1))
    assert parts.no_target.item() == pytest.approx(LOG2)
    # Nothing is above one half, so the mask's IoU is 0, predicted was 1/2.
    assert parts.iou.item() == pytest.approx(0.25)
    whole = parts.mask + parts.dice + parts.no_target + parts.iou
    assert parts.total.item() == pytest.approx(whole.item())


def test_a_perfect_mask_costs_next_to_nothing() -> None:
    logits = (_half() * 2 - 1) * 20
    parts = _parts(logits, _half(), iou=torch.ones(1), none_logits=torch.full((1,), -20.0))
    assert parts.total.item() < 1e-4


def test_soft_targets_are_best_met_by_their_own_probability() -> None:
    target = torch.full((1, 4, 4), 0.3)
    own = math.log(0.3 / 0.7)
    costs = [_parts(torch.full((1, 4, 4), x), target).mask.item() for x in (own - 1, own, own + 1)]
    assert costs[1] < min(costs[0], costs[2])
    assert costs[1] == pytest.approx(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)))


def test_weights_are_factors_and_zero_switches_off() -> None:
    plain = _parts(torch.zeros(1, 4, 4), _half())
    weighted = _parts(torch.zeros(1, 4, 4), _half(), loss=_loss(weights=(2, 0, 3, 0.5)))
    assert weighted.mask.item() == pytest.approx(2 * plain.mask.item())
    assert weighted.dice.item() == 0
    assert weighted.no_target.item() == pytest.approx(3 * plain.no_target.item())
    assert weighted.iou.item() == pytest.approx(0.5 * plain.iou.item())


def test_focal_loss_by_hand() -> None:
    """Probability 1/2 is off by 1/2 everywhere: the factor is (1/2)^gamma."""
    parts = _parts(torch.zeros(1, 4, 4), _half(), loss=_loss(gamma=2.0))
    assert parts.mask.item() == pytest.approx(LOG2 / 4)
    # Lin et al.'s -(1 - p)^gamma log p on hard targets.
    logits = noise(1, 4, 4)
    p = torch.where(_half() > 0, logits.sigmoid(), 1 - logits.sigmoid())
    expected = (-((1 - p) ** 2) * p.log()).mean()
    found = _parts(logits, _half(), loss=_loss(gamma=2.0)).mask
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# --- no target ------------------------------------------------------------------------------------


def test_expressions_without_target_have_no_dice_and_teach_no_iou() -> None:
    target = _half(2)
    target[1] = 0
    none = torch.tensor([0.0, 1.0])
    logits = noise(2, 4, 4).requires_grad_()
    iou = torch.tensor([0.4, 0.9], requires_grad=True)
    parts = _parts(logits, target, no_target=none, iou=iou)
    alone = _parts(logits[:1], target[:1], iou=iou[:1])
    assert parts.dice.item() == pytest.approx(alone.dice.item())
    assert parts.iou.item() == pytest.approx(alone.iou.item())
    (parts.dice + parts.iou).backward()
    assert logits.grad is not None
    assert iou.grad is not None
    assert logits.grad[1].abs().max() == 0
    assert iou.grad[1] == 0
    assert logits.grad[0].abs().max() > 0
    # Their masks are still pulled to empty.
    logits.grad = None
    _parts(logits, target, no_target=none).mask.backward()
    assert (logits.grad[1] > 0).all()


def test_a_batch_without_any_target_is_finite() -> None:
    parts = _parts(noise(2, 4, 4), torch.zeros(2, 4, 4), no_target=torch.ones(2))
    assert parts.dice.item() == 0
    assert parts.iou.item() == 0
    assert torch.isfinite(parts.total)


def test_no_target_head_learns_by_cross_entropy() -> None:
    logits = torch.tensor([2.0, -1.0])
    found = _parts(
        torch.zeros(2, 4, 4), _half(2), no_target=torch.tensor([1.0, 0.0]), none_logits=logits
    ).no_target
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))) / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --- padding and sizes ----------------------------------------------------------------------------


def test_padding_counts_for_nothing() -> None:
    valid = torch.zeros(1, 4, 4)
    valid[:, :3] = 1
    target = _half() * valid
    results = []
    for fill in (-50.0, 50.0):
        logits = noise(1, 4, 4).clone()
        logits[:, 3] = fill
        logits.requires_grad_()
        parts = _parts(logits, target, valid=valid)
        parts.total.backward()
        assert logits.grad is not None
        assert logits.grad[:, 3].abs().max() == 0
        results.append(parts)
    for name in ("mask", "dice", "iou"):
        assert getattr(results[0], name).item() == pytest.approx(getattr(results[1], name).item())


def test_every_expression_weighs_the_same_however_much_of_its_square_is_padding() -> None:
    """Logits 0: each has ln 2 on its own valid cells, so has the batch."""
    valid = torch.ones(2, 4, 4)
    valid[1, 1:] = 0
    parts = _parts(torch.zeros(2, 4, 4), _half(2) * valid, valid=valid)
    assert parts.mask.item() == pytest.approx(LOG2)


def test_logits_are_brought_to_the_targets_size() -> None:
    flat = torch.full((1, 2, 2), 0.7)
    small = _parts(flat, _half())
    large = _parts(torch.full((1, 16, 16), 0.7), _half())
    same = _parts(torch.full((1, 4, 4), 0.7), _half())
    assert small.total.item() == pytest.approx(same.total.item())
    assert large.total.item() == pytest.approx(same.total.item())


def test_predicted_iou_learns_the_iou_of_the_thresholded_mask() -> None:
    """Left half predicted and true but for one column: 4 of 12 cells shared."""
    logits = torch.full((1, 4, 4), -3.0)
    logits[:, :, 1:3] = 3.0
    for guess, cost in ((4 / 12, 0.0), (1.0, (8 / 12) ** 2)):
        parts = _parts(logits, _half(), iou=torch.tensor([guess]))
        assert parts.iou.item() == pytest.approx(cost, abs=1e-6)


# --- dense ----------------------------------------------------------------------------------------


def _dense(
    right: bool, background_weight: float = 0.5
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
    """2x2 cells, one of them foreground: class 2 of shape, 1 of colour, 1 of size."""
    labels = torch.zeros(1, 3, 2, 2, dtype=torch.long)
    labels[0, :, 0, 0] = torch.tensor([2, 1, 1])
    centres = torch.zeros(1, 2, 2, 2)
    centres[0, :, 0, 0] = torch.tensor([0.3, -0.4])
    logits = []
    for number, classes in enumerate((4, 3, 2)):
        scores = torch.nn.functional.one_hot(labels[:, number], classes).permute(0, 3, 1, 2) * 30.0
        logits.append((scores if right else torch.zeros_like(scores)).requires_grad_())
    offset = (centres.clone() if right else torch.zeros_like(centres)).requires_grad_()
    total, figures = dense_loss(DenseOutput(*logits, offset), labels, centres, background_weight)
    return total, figures, (*logits, offset)


def test_dense_loss_of_the_truth_is_zero() -> None:
    total, figures, _ = _dense(right=True)
    assert total.item() < 1e-5
    assert {n: v.item() for n, v in figures.items()} == {
        "shape": 1.0, "color": 1.0, "size": 1.0, "centre_error": 0.0,
    }  # fmt: skip


def test_dense_loss_by_hand() -> None:
    total, figures, parts = _dense(right=False)
    classes = math.log(4) + math.log(3) + math.log(2)
    smooth = 0.3 - 0.01 + 0.4 - 0.01  # |x| - beta/2, beta 0.02
    assert total.item() == pytest.approx(classes + 10 * smooth, rel=1e-5)
    assert figures["centre_error"].item() == pytest.approx(0.5)
    # Equal scores: class 0 wins, which is wrong on the only foreground cell.
    assert figures["shape"].item() == 0
    total.backward()
    offset = parts[-1]
    assert offset.grad is not None
    assert offset.grad[0, :, 0, 0].abs().min() > 0
    assert offset.grad.abs().sum() == offset.grad[0, :, 0, 0].abs().sum()
    shape = parts[0].grad
    assert shape is not None
    background = shape[0, 0, 1, 1] / shape[0, 2, 0, 0]
    assert background.item() == pytest.approx(0.5)


def test_dense_loss_without_foreground_is_finite() -> None:
    labels, centres = torch.zeros(1, 3, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, 2)
    logits = [noise(1, c, 2, 2) for c in (4, 3, 2)]
    output = DenseOutput(*logits, noise(1, 2, 2, 2))
    total, figures = dense_loss(output, labels, centres, 0.08)
    assert torch.isfinite(total)
    assert all(value.item() == 0 for value in figures.values())


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_an_expression_of_weight_one_half_counts_half(gamma: float) -> None:
    """Twice at one half is once, and the whole of a batch is that of its parts by their weights."""
    torch.manual_seed(0)
    logits, target, none = noise(3, 4, 4), torch.rand(3, 4, 4), torch.tensor([0.0, 0.0, 1.0])
    loss, valid = _loss(gamma), torch.ones(3, 4, 4)

    def total(rows: list[int], weights: list[float]) -> float:
        decoded = Decoded(logits[rows], torch.full((len(rows),), 0.3), noise(3)[rows])
        parts = loss(decoded, target[rows], valid[rows], none[rows], None, torch.tensor(weights))
        return float(parts.total)

    once = total([0, 1, 2], [1.0, 1.0, 1.0])
    assert total([0, 0, 1, 2], [0.5, 0.5, 1.0, 1.0]) == pytest.approx(once, rel=1e-6)
    assert total([0, 1, 2], [0.5, 1.0, 1.0]) != pytest.approx(once, rel=1e-3)
    # Only the proportions count.
    assert total([0, 1, 2], [0.25, 0.25, 0.25]) == pytest.approx(once, rel=1e-6)


def test_a_target_smaller_than_a_cell_is_not_found_by_an_empty_mask() -> None:
    targets = torch.zeros(2, 4, 4, dtype=torch.uint8)
    targets[0, 1, 1] = 40
    batch = ReferringBatch(
        images=torch.zeros(1, 4, 4, 3, dtype=torch.uint8),
        fitted=torch.tensor([[4, 4]]),
        image_index=torch.zeros(2, dtype=torch.long),
        input_ids=torch.zeros(2, 1),
        attention_mask=torch.ones(2, 1),
        targets=targets,
        no_target=torch.tensor([0.0, 1.0]),
        weights=torch.ones(2),
    )
    logits = torch.full((2, 4, 4), -9.0)
    empty = _scores(0, batch, Decoded(logits, torch.ones(2), torch.zeros(2)), 0.5, 0.5)
    assert summarize(empty)["miou"] == 0.5
    logits[0, 1, 1] = 9
    found = _scores(0, batch, Decoded(logits, torch.ones(2), torch.zeros(2)), 0.5, 0.5)
    assert summarize(found)["miou"] == 1
