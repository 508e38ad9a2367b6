"""The text encoder: any Hugging Face text model, as words and one sentence vector (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TextFeatures:
    """Linguistic features F_l of E expressions, padded to L words.

    Attributes:
        words: (E, L, C).
        valid: (E, L) bool, False at padding.
        sentence: (E, C), the CLS word's (BERT) or the EOS word's (CLIP).
    """

    words: Tensor
    valid: Tensor
    sentence: Tensor


class TextEncoder(nn.Module):
    """Wraps a Hugging Face text model and projects its output to the network's width.

    Args:
        backbone: a module called with ``input_ids`` and ``attention_mask`` that returns an
            object with ``last_hidden_state`` (E, L, hidden), such as BertModel or CLIPTextModel.
        hidden: the backbone's width.
        dim: the network's width C.
        eos_token_id: for CLIP, the token whose vector stands for the sentence; None takes the
            first word (CLS), as BERT does.
        trainable: False runs the backbone without gradients and keeps it in evaluation mode.
    """

    def __init__(
        self,
        backbone: nn.Module,
        hidden: int,
        dim: int,
        *,
        eos_token_id: int | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.eos_token_id = eos_token_id
        self.trainable = trainable
        self.project_words = nn.Sequential(nn.Linear(hidden, dim), nn.LayerNorm(dim))
        self.project_sentence = nn.Sequential(nn.Linear(hidden, dim), nn.LayerNorm(dim))
        self.backbone.requires_grad_(trainable)

    def train(self, mode: bool = True) -> TextEncoder:
        """Switches to training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if not self.trainable:
            self.backbone.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Maps token ids and mask, both (E, L) integers, to linguistic features."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state  # (E, L, hidden)
        valid = attention_mask.bool()
        if self.eos_token_id is None:
            sentence = hidden[:, 0]
        else:
            # The first EOS ends the sentence; CLIP pads with the same token.
            end = (input_ids == self.eos_token_id).int().argmax(dim=1)
            sentence = hidden[torch.arange(len(hidden), device=hidden.device), end]
        return TextFeatures(self.project_words(hidden), valid, self.project_sentence(sentence))
