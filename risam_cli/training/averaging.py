"""Weights kept while training, and their mean: checkpoint averaging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from risam_cli.errors import ModelError
from risam_cli.files.write import write_atomic
from risam_cli.training.checkpoint import Place


class KeptWeights:
    """The trained weights of some validations, on disk beside the checkpoints.

    What is kept stands in the :class:`Place`, so that a resumed run keeps the same; a file goes
    only when no checkpoint names it any more.

    Args:
        folder: for the files; count: how many are kept; of: "best" by figure, or "last".
    """

    def __init__(self, folder: Path, count: int, of: str) -> None:
        self.folder = folder
        self.count = count
        self.of = of

    def add(self, place: Place, figure: float, module: nn.Module, *, write: bool) -> None:
        """Takes the present weights in, if they are among those to keep.

        Raises:
            OutputError: they cannot be written.
        """
        kept = [*(one for one in place.kept if one[0] != place.step), (place.step, figure)]
        if self.of == "best":  # Of equals the earlier one, as best/ is.
            kept = sorted(sorted(kept, key=lambda one: (-one[1], one[0]))[: self.count])
        place.kept = kept[-self.count :]
        if write and place.step in [step for step, _ in place.kept]:
            self.folder.mkdir(parents=True, exist_ok=True)
            weights = {n: p.detach().cpu().contiguous() for n, p in _trained(module).items()}
            write_atomic(self._path(place.step), lambda part: _save(weights, part))

    def prune(self, place: Place) -> None:
        """Removes what the checkpoint just written names no more."""
        if self.folder.is_dir():
            wanted = {self._path(step) for step, _ in place.kept}
            for path in self.folder.glob("step*.safetensors"):
                if path not in wanted:
                    path.unlink(missing_ok=True)

    def mean(self, place: Place) -> dict[str, torch.Tensor]:
        """The mean of the kept weights, double precision.

        Raises:
            ModelError: kept weights are missing or damaged.
        """
        sums: dict[str, torch.Tensor] = {}
        for step, _ in place.kept:
            try:
                held = load_file(self._path(step))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self._path(step)} cannot be read: {error}", "set averaging to null"
                ) from error
            if sums and held.keys() != sums.keys():
                raise ModelError(f"{self._path(step)} is of another network", "remove it")
            for name, value in held.items():
                sums[name] = sums.get(name, 0) + value.double() / len(place.kept)
        return sums

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step:08d}.safetensors"


@contextmanager
def weights_in(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The module with other values of what it trains; afterwards with its own.

    Raises:
        ModelError: the weights are of another network.
    """
    trained = _trained(module)
    if weights.keys() != trained.keys():
        raise ModelError("the kept weights are of another network", "set averaging to null")
    before = {name: p.detach().clone() for name, p in trained.items()}
    try:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(before[name])


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(weights, path)
    except SafetensorError as error:  # It tells of a full disk by its own.
        raise OSError(str(error)) from error
