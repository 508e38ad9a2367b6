"""Our BERT against transformers': the same names, the same numbers, and none of its import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.networks import randomize
from torch import nn

from risam_cli.weights.text import PlainConfig, _bert, _is_plain_bert, _stored_config

NUMBERS: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}


def both(**changes: Any) -> tuple[nn.Module, nn.Module]:
    """Transformers' and ours with the same random weights."""
    from transformers import BertConfig, BertModel

    theirs = randomize(BertModel(BertConfig(**NUMBERS, **changes), add_pooling_layer=False))
    stored = theirs.config.to_dict()
    assert isinstance(_stored_config(stored), PlainConfig)
    ours = _bert(_stored_config(stored))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3, 1)])
def test_it_says_what_transformers_bert_says(lengths: tuple[int, ...]) -> None:
    theirs, ours = both()
    ids = torch.randint(1, 50, (len(lengths), 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    found = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-6, atol=1e-6)


def test_it_learns_as_transformers_bert_does() -> None:
    theirs, ours = both(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        output = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids))
        output.last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"is_decoder": True},
        {"position_embedding_type": "relative_key"},
        {"model_type": "clip_text_model"},
        {"layer_norm_eps": None},
    ],
)
def test_what_is_no_plain_bert_is_left_to_transformers(change: dict[str, Any]) -> None:
    from transformers import BertConfig

    assert _is_plain_bert(BertConfig(**NUMBERS).to_dict())
    assert not _is_plain_bert({**BertConfig(**NUMBERS).to_dict(), **change})


def test_the_bundled_model_loads_without_transformers() -> None:
    script = (
        "import sys, torch; from risam_cli.weights.load import load_model; "
        "loaded = load_model(None, device=torch.device('cpu')); "
        "assert loaded.tokenizer.encode(['red circle']).input_ids.shape == (1, 4); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
