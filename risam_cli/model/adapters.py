"""Adapters: parameter-efficient tuning of the frozen image encoder."""

from __future__ import annotations

from torch import Tensor, nn

from risam_cli.model.linear import apply_linear


class Adapter(nn.Module):
    """A bottleneck beside a block's MLP: down, GELU, up.

    The paper names parameter-efficient fine-tuning; this form is ours (after Houlsby et al.
    2019, run in parallel). The up-projection starts at zero, so that an untrained adapter
    leaves the encoder as it is.

    Args:
        dim: width of the block.
        hidden: width of the bottleneck, at least 1.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to the change that is added to the block's output."""
        return apply_linear(self.up, apply_linear(self.down, x, gelu=True))
