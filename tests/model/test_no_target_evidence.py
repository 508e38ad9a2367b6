"""The mask's own say on no-target."""

from __future__ import annotations

from typing import Any

import torch
from support.networks import streams

from risam_cli.model.mask_decoder import MutualAwareMaskDecoder, NoTargetEvidence


def decoder(*, evidence: bool) -> MutualAwareMaskDecoder:
    torch.manual_seed(0)
    return MutualAwareMaskDecoder(16, 2, 1, 32, 8, no_target_evidence=evidence).eval()


def inputs(expressions: int, rows: slice = slice(None)) -> tuple[Any, ...]:
    """The streams of some of the expressions."""
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(expressions, 16, 16, generator=generator)  # 4 x 4 regions
    position = torch.randn(16, 16, generator=generator)
    words = torch.randn(expressions, 5, 16, generator=generator)
    sentence = torch.randn(expressions, 16, generator=generator)
    valid = torch.ones(expressions, 5, dtype=torch.bool)
    return streams(
        visual[rows],
        position,
        words[rows],
        valid[rows],
        owner=None,
        sentence=sentence[rows],
        grid=(4, 4),
    )


def test_added_to_trained_weights_it_changes_nothing() -> None:
    without, added = decoder(evidence=False), decoder(evidence=True)
    missing, unexpected = added.load_state_dict(without.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("evidence.") for name in missing)
    given = inputs(3)
    first = without(*given)
    second = added(*given)
    assert torch.equal(first.no_target_logits, second.no_target_logits)
    assert torch.equal(first.mask_logits, second.mask_logits)


def test_it_reads_the_features_under_the_mask() -> None:
    torch.manual_seed(2)
    evidence = NoTargetEvidence(16)
    torch.nn.init.normal_(evidence.head.layers[-1].weight)
    mask = torch.full((1, 16, 16), -20.0)
    mask[:, :4, :4] = 20.0  # the first of the 4 x 4 regions
    visual = torch.randn(1, 16, 16)
    said = evidence(mask, visual)
    elsewhere, under = visual.clone(), visual.clone()
    elsewhere[:, 1:] += 1
    under[:, 0] += 1
    assert torch.allclose(evidence(mask, elsewhere), said, atol=1e-4)
    assert not torch.allclose(evidence(mask, under), said, atol=1e-2)


def test_the_no_target_loss_does_not_move_the_mask() -> None:
    module = decoder(evidence=True)
    assert module.evidence is not None
    torch.nn.init.normal_(module.evidence.head.layers[-1].weight)
    mask = torch.randn(2, 16, 16, requires_grad=True)
    visual = torch.randn(2, 16, 16, requires_grad=True)
    module.evidence(mask, visual).sum().backward()
    assert mask.grad is None
    assert visual.grad is not None
    assert visual.grad.abs().sum() > 0


def test_an_expression_does_not_depend_on_its_neighbours() -> None:
    module = decoder(evidence=True)
    assert module.evidence is not None
    torch.nn.init.normal_(module.evidence.head.layers[-1].weight)
    together = module(*inputs(4)).no_target_logits
    alone = [module(*inputs(4, slice(k, k + 1))) for k in range(4)]
    torch.testing.assert_close(together, torch.cat([d.no_target_logits for d in alone]))
