"""An image encoder's weights out of an earlier training of this project's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from risam_cli.errors import ModelError
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.weights import folder as model_folders
from risam_cli.weights.torch_files import load_plain

_PREFIX = "image_encoder."


def start_encoder(encoder: ImageEncoder, source: str) -> None:
    """Fills an image encoder with the weights of an earlier one; adapters may be new.

    Args:
        encoder: of the earlier one's sizes.
        source: a model folder or bundled model, or the ``checkpoints/last.pt`` of a training
            run, which may have ended with a dense stage.

    Raises:
        ModelError: a file that cannot be read or holds code, or an encoder that does not fit.
    """
    weights = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in _tensors(source).items()
        if name.startswith(_PREFIX)
    }
    own = encoder.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            if ".adapter." in name:
                continue
            raise ModelError(
                f"init_encoder_from {source} has no image encoder weight {name}",
                "give the model section the values of that training",
            )
        if weights[name].shape != tensor.shape:
            raise ModelError(
                f"init_encoder_from {source}: {name} is {tuple(weights[name].shape)}, the "
                f"encoder's is {tuple(tensor.shape)}",
                "give model.image_encoder the values of that training",
            )
    unused = [name for name in weights if name not in own]
    if unused:
        raise ModelError(
            f"init_encoder_from {source} has a weight that the encoder lacks: {unused[0]}",
            "give model.image_encoder the values of that training",
        )
    encoder.load_state_dict({**own, **weights})


def _tensors(source: str) -> Mapping[str, Tensor]:
    path = Path(source)
    try:
        if path.is_file():
            state: Any = load_plain(path)
            model = state.get("model") if isinstance(state, dict) else None
            if not isinstance(model, dict) or not all(
                isinstance(value, Tensor) for value in model.values()
            ):
                raise ModelError(f"{path} is no checkpoint of risam train", "give its last.pt")
            return model
        folder = model_folders.find_model(source)
        if model_folders.read_model_folder(folder).needs:
            from risam_cli.weights.load import load_model

            return load_model(folder, device=torch.device("cpu")).model.state_dict()
        return load_file(folder / model_folders.WEIGHTS_FILE)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"init_encoder_from {source} cannot be read: {reason}",
            "give a model folder or a training run's checkpoints/last.pt",
        ) from error
