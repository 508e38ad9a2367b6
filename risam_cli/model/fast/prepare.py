"""Which form of each module runs: plain equations, or what is fastest on a device.

A network is built plain. For inference, and some of them for training, its modules change their
class: to a subclass with the same weights, names and results (up to rounding), and a faster
``forward``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from risam_cli.model.fast.decoding import FastRisam, HostRisam
from risam_cli.model.fast.encoder import (
    FastAdapter,
    FastAttention,
    FastImageEncoder,
    FastMLPBlock,
    HostImageEncoder,
)
from risam_cli.model.fast.linear import FastLinear
from risam_cli.model.fast.training import (
    TrainedAttention,
    TrainedLayerNorm,
    TrainedLayerNorm2d,
    TrainedRisam,
    TrainedTextEncoder,
)
from risam_cli.model.image_encoder import Adapter, Attention, Block, ImageEncoder, MLPBlock
from risam_cli.model.layers import LayerNorm2d
from risam_cli.model.mask_decoder import MutualAwareMaskDecoder
from risam_cli.model.risam import Risam
from risam_cli.model.text_encoder import TextEncoder

_Forms = dict[type[nn.Module], type[nn.Module]]
_TRAINING: _Forms = {  # these know gradients
    ImageEncoder: FastImageEncoder,
    MLPBlock: FastMLPBlock,
    Adapter: FastAdapter,
    nn.Linear: FastLinear,
}
_TRAINING_ON_CPU: _Forms = {
    Attention: TrainedAttention,
    LayerNorm2d: TrainedLayerNorm2d,
    TextEncoder: TrainedTextEncoder,
    nn.LayerNorm: TrainedLayerNorm,
}
_INFERENCE: _Forms = {**_TRAINING, Attention: FastAttention}


class RecomputedBlock(Block):
    """A block that keeps nothing for its gradients and computes them from its input again."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, h, w, D) to the same shape."""
        recomputed: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return recomputed


_PLAIN: _Forms = {
    **{fast: plain for plain, fast in (*_INFERENCE.items(), *_TRAINING_ON_CPU.items())},
    HostImageEncoder: ImageEncoder,
    RecomputedBlock: Block,
    FastRisam: Risam,
    HostRisam: Risam,
    TrainedRisam: Risam,
}


def prepare_for_inference(
    module: nn.Module,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    *,
    compiled: bool = False,
) -> None:
    """Gives a network, or an image encoder, its fastest forms; gradients are not to be asked for.

    Args:
        module: is changed in place; its state dict keeps its names. Where its weights change later,
            it is to be prepared again.
        device: that it runs on.
        precision: in which image encoders hold the weights of their blocks' and neck's products.
            Norms, position tables, the first convolutions and the stream between the blocks stay
            in float32, so features come out in float32 (ours). Half of the memory goes, and with
            it the casts that autocast does at every call; results are closer to float32's.
        compiled: have PyTorch compile the image encoder's blocks when they first run, for a GPU.
            Blocks of a kind share what is compiled, and it is kept on disk for later processes, in
            the folder that ``TORCHINDUCTOR_CACHE_DIR`` names.
    """
    take_plain_forms(module)
    for part in list(module.modules()):
        if isinstance(part, Risam) and device.type == "cpu":
            part.__class__ = HostRisam
        if _decodes_fast(part, device):
            part.__class__ = FastRisam
            cast(FastRisam, part).keep_weights()
        if isinstance(part, ImageEncoder):
            on_host = {ImageEncoder: HostImageEncoder} if device.type == "cpu" else {}
            _change(part, _INFERENCE | on_host)
            if precision != torch.float32:
                _hold_weights_in(part, precision)
            for block in part.blocks if compiled else ():
                block.compile()


def prepare_for_training(
    module: nn.Module, device: torch.device, *, recompute_blocks: bool = False
) -> None:
    """Gives a network, or an image encoder, the forms that know gradients.

    Args:
        device: that it runs on.
        recompute_blocks: let the image encoder's blocks recompute what their gradients need.
    """
    take_plain_forms(module)
    for part in list(module.modules()):
        if isinstance(part, ImageEncoder):
            _change(part, _TRAINING | ({Block: RecomputedBlock} if recompute_blocks else {}))
        if device.type == "cpu":
            part.__class__ = _TRAINING_ON_CPU.get(type(part), type(part))
        if _decodes_fast(part, device):
            part.__class__ = TrainedRisam


def take_plain_forms(module: nn.Module) -> None:
    """Gives all of a module the forms that it was built in."""
    for part in module.modules():
        part.__class__ = _PLAIN.get(type(part), type(part))


@contextmanager
def inference_forms(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it a network that is being trained runs as :func:`prepare_for_inference` has it."""
    before = [(part, type(part)) for part in module.modules()]
    prepare_for_inference(module, device)
    try:
        yield
    finally:
        for part, form in before:
            part.__class__ = form


def _decodes_fast(model: nn.Module, device: torch.device) -> bool:
    on_host = device.type == "cpu" and isinstance(model, Risam)
    return on_host and isinstance(model.mask_decoder, MutualAwareMaskDecoder)


def _change(encoder: ImageEncoder, forms: _Forms) -> None:
    for part in (encoder, *encoder.blocks.modules()):
        form = forms.get(type(part))
        if form is not None:
            part.__class__ = form
            if isinstance(part, (FastImageEncoder, FastAttention)):
                part.keep_tables()


def _hold_weights_in(encoder: ImageEncoder, dtype: torch.dtype) -> None:
    for part in (*encoder.blocks.modules(), *encoder.neck.modules()):
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)
