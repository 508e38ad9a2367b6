"""Rows of tokens by head and by expression."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from risam_cli.model.fast.folding import Layout


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), heads=st.integers(1, 3))
def test_rows_of_an_expression_lie_together_and_find_back(lengths: list[int], heads: int) -> None:
    layout = Layout.of(tuple(lengths), heads)
    owner = torch.repeat_interleave(torch.tensor(lengths))  # (T,)
    word = torch.arange(len(owner))
    head = torch.arange(heads)
    rows = torch.stack(torch.broadcast_tensors(head[:, None], word, owner), dim=-1)

    moved = layout.by_expression(rows)

    assert torch.equal(layout.by_head(moved), rows)
    for number, part in enumerate(layout.split(moved)):
        own = word[owner == number].tolist()
        assert part.tolist() == [[h, w, number] for h in range(heads) for w in own]
