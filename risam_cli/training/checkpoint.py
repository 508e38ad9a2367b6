"""Where a training run stands: its place, checkpoints, the moving average and kept weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from risam_cli.console.console import get_console
from risam_cli.errors import ModelError, RisamError, reason_of, setting
from risam_cli.files.write import write_file
from risam_cli.weights.torch_files import load_plain, require_sealed, seal_file

LAST = "last.pt"
PROGRESS = "progress.json"
FORMAT = 2


class MovingAverage:
    """Exponential moving average of a module's trained parameters.

    Its decay starts low, (1 + n) / (10 + n) after n updates, so that early noise is forgotten.

    Args:
        module: its parameters that require gradients are averaged; decay: in 0..1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters' present values in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.average.values()), [p.data for p in self.live.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's values with the averaged ones; a second call undoes it."""
        for name, parameter in self.live.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with the averaged values; afterwards with its own."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


@dataclass
class Place:
    """Where a run stands.

    Attributes:
        stage, step: number of the stage, steps done in it.
        best: the figure of ``best/`` so far; seconds, expressions: of all stages.
        validated: the step of this stage that was validated last; below ``step`` at a step that
            is to be validated, the run was stopped before it was.
        stage_best, since_best: the watched figure's best value in this stage, and how many
            validations have passed since.
        stopped: this stage ended early.
        kept: (step, figure) of the weights that are kept for averaging.
        averaged: the average has been made.
        judged: hash of what the figures were measured by, see :func:`.identity.judge_hash`.
        trained_on: what the training data were, as a model's card says it.
    """

    stage: int = 0
    step: int = 0
    best: float = -1.0
    seconds: float = 0.0
    expressions: int = 0
    validated: int = 0
    stage_best: float = -math.inf
    since_best: int = 0
    stopped: bool = False
    kept: list[tuple[int, float]] = field(default_factory=list)
    averaged: bool = False
    judged: str = ""
    trained_on: list[dict[str, Any]] = field(default_factory=list)


def stage_of_weights(place: Place) -> int:
    """The last stage that has borne on the weights: at a stage's start, the one before."""
    return place.stage - 1 if place.stage and not place.step else place.stage


def forget_lost_best(place: Place, best: Path, stages: int) -> None:
    """Forgets the best figure where its model is lost, so that the next one is kept.

    Raises:
        ModelError: all ``stages`` are done, so that none will come.
    """
    if place.best < 0 or best.is_dir():
        return
    if place.stage == stages:
        raise ModelError(
            f"{best} is missing, and the run is finished",
            f"put it back, add a stage, or start over without {setting('resume')}",
        )
    place.best = -1.0
    get_console().warn(f"{best} is missing: the next validation's weights become best/")


_OTHER = re.compile(r"stage(\d+)-step(\d+)\.pt")  # not what a user has copied beside it


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        values = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        sha.update(values.numpy().data)
    return sha.hexdigest()


class Untrained:
    """Parameters that no stage so far has trained: they stay out of checkpoints.

    Whoever builds the run again gets the same values from the same files and seed; a digest tells
    where that is not so.

    Args:
        model: the network, before its first stage.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {name for name, _ in model.named_parameters()}
        self._digest = ""

    def stage_begins(self) -> None:
        """Takes note of what is trained from now on."""
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        names = self.names - trained
        if names != self.names or not self._digest:
            self.names = names
            self._digest = self.digest()

    def digest(self) -> str:
        """SHA-256 over their values, in the order of their names."""
        state = self.model.state_dict()
        return digest_of_tensors({name: state[name] for name in self.names})

    def trained(self) -> dict[str, Tensor]:
        """All other values of the network."""
        return {k: v for k, v in self.model.state_dict().items() if k not in self.names}

    def save(self) -> dict[str, Any]:
        """What a checkpoint says of them."""
        return {"names": sorted(self.names), "sha256": self._digest}

    def load(self, weights: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Loads what :meth:`trained` gave, if the rest is what it was.

        Raises:
            ModelError: it is not.
        """
        self.names, self._digest = set(note["names"]), str(note["sha256"])
        found = self.digest()
        if found != self._digest:
            raise ModelError(
                f"the {len(self.names)} weights that are not trained are not those the run was "
                f"started with (SHA-256 {found[:12]}…, was {self._digest[:12]}…)",
                "give the files that it was started with",
            )
        missing, surplus = self.model.load_state_dict(weights, strict=False)
        if surplus or set(missing) != self.names:
            raise ModelError(
                "the checkpoint holds another network", f"start without {setting('resume')}"
            )


class Checkpoints:
    """``last.pt`` and, where asked, the ones before it, by stage and step.

    Args:
        folder: made if it is not there; keep: how many there are at most.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep
        self.last = folder / LAST
        self.progress = folder / PROGRESS

    def save(
        self,
        place: Place,
        settings_hash: str,
        module: nn.Module,
        untrained: Untrained,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """Writes all that a resumed run needs; an older checkpoint survives a failure.

        Raises:
            OutputError: where it cannot be written.
            RisamError: the weights are not finite; a good checkpoint is not replaced by such.
        """
        state: dict[str, Any] = {
            "format": FORMAT,
            "place": vars(place).copy(),
            "settings_hash": settings_hash,
            "model": untrained.trained(),
            "untrained": untrained.save(),
            "module": module.state_dict() if module is not untrained.model else {},
            "optimizer": optimizer.state_dict() if optimizer else {},
            "scaler": scaler.state_dict() if scaler else {},
            "average": average.average if average else {},
            "updates": average.updates if average else 0,
        }
        bad = [name for name, value in state["model"].items() if not value.isfinite().all()]
        if bad:
            raise RisamError(
                f"{len(bad)} weights hold NaN or infinity after stage {place.stage + 1}, step "
                f"{place.step}, first {bad[0]!r}",
                "lower the learning rate" + self.kept(),
            )
        write_file(self.last, lambda temporary: _write(state, temporary))
        self.follow(place)

    def follow(self, place: Place) -> None:
        """Brings the files beside ``last.pt`` to its place, also where a kill fell between them.

        Raises:
            OutputError: where they cannot be written.
        """
        # That there was one: a run without any may begin anew, one that lost its own may not.
        write_file(self.progress, json.dumps({"stage": place.stage + 1, "step": place.step}) + "\n")
        if self.keep > 1:
            self._keep(place)

    def kept(self) -> str:
        """Words about the last good checkpoint, for the end of a message; empty without one."""
        return f"; the last good checkpoint is {self.last}" * self.last.is_file()

    def _keep(self, place: Place) -> None:
        path = self.folder / f"stage{place.stage + 1}-step{place.step:08d}.pt"
        path.unlink(missing_ok=True)
        try:
            os.link(self.last, path)
        except OSError:  # A file system without links.
            write_file(path, lambda temporary: shutil.copyfile(self.last, temporary))
        for old in self.others()[: -self.keep]:
            old.unlink(missing_ok=True)

    def to_resume(self) -> Path | None:
        """The checkpoint to go on from; None where the run ended before its first.

        Raises:
            ModelError: there was one, and none is there any more.
        """
        if self.last.is_file():
            return self.last
        if others := self.others():
            get_console().warn(f"{self.last} is missing; continuing from {others[-1].name}")
            return others[-1]
        if self.progress.exists():
            raise ModelError(
                f"{self.last} is missing, and no earlier checkpoint is there",
                "put it back, or train into another output folder",
            )
        return None

    def others(self) -> list[Path]:
        """The checkpoints under their own names, oldest first."""
        named = ((_OTHER.fullmatch(path.name), path) for path in self.folder.glob("stage*.pt"))
        found = [(int(name[1]), int(name[2]), path) for name, path in named if name]
        return [path for *_, path in sorted(found)]


def _write(state: dict[str, Any], path: Path) -> None:
    # Through Python's own file: torch's writer tells of a full disk in many words, and late.
    with path.open("wb") as file:
        torch.save(state, file)
    seal_file(path)


def read_state(
    path: Path, hashes: Sequence[str], differences: Callable[[int], str] = lambda stage: ""
) -> dict[str, Any]:
    """Reads a checkpoint of the same settings; runs no code that it may hold.

    Args:
        hashes: of the settings up to and with each stage. Stages that had not begun may have
            changed since, or been added.
        differences: which settings up to and with a stage are others than the run's; for a message.

    Raises:
        ModelError: a damaged file, or one of other settings.
    """
    try:
        require_sealed(path)
        state: dict[str, Any] = load_plain(path)
    except ModelError as error:
        raise ModelError(f"checkpoint {error.message}", _way_out(path)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ModelError(
            f"{path} is not a checkpoint of risam train", f"start without {setting('resume')}"
        )
    try:
        place = Place(**state["place"])
        # At a stage's start, either side of the border is the same state.
        fitting = {hashes[n] for n in (stage_of_weights(place), place.stage) if n < len(hashes)}
        belongs = state["settings_hash"] in fitting
    except (KeyError, TypeError, IndexError) as error:
        why = f"checkpoint {path} is damaged: {reason_of(error)}"
        raise ModelError(why, _way_out(path)) from error
    if not belongs:
        raise ModelError(
            f"checkpoint {path} belongs to other settings"
            + (f": {told}" if (told := differences(stage_of_weights(place))) else ""),
            "resume with the settings it was started with (config.resolved.yaml), or choose "
            "another output folder",
        )
    return state


def _way_out(path: Path) -> str:
    others = Checkpoints(path.parent).others()
    return f"put {others[-1].name} in its place" if others else f"start without {setting('resume')}"


def restore(
    state: dict[str, Any],
    module: nn.Module,
    untrained: Untrained,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: MovingAverage | None,
) -> None:
    """Puts a checkpoint's values back in place.

    Raises:
        ModelError: a checkpoint of another version, whose optimizer is not put together like ours,
            or one whose values fit nothing.
    """
    try:
        untrained.load(state["model"], state["untrained"])
        if state["module"]:
            module.load_state_dict(state["module"])
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ModelError(
                f"the checkpoint's optimizer is that of another version: {error}",
                "resume with that version, or start over from its best/ by init_from",
            ) from error
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        if average is not None:
            average.updates = state["updates"]
            with torch.no_grad():
                for name, value in state["average"].items():
                    average.average[name].copy_(value)
    except ModelError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, ValueError) as error:
        why = f"the checkpoint does not fit the model: {reason_of(error)}"
        raise ModelError(why, f"start without {setting('resume')}") from error


# --- weights kept for averaging -------------------------------------------------------------------


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
            write_file(self._path(place.step), lambda part: _save_tensors(weights, part))

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
                with safe_open(self._path(step), framework="pt") as file:
                    held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    whole = (file.metadata() or {}).get("sha256") == digest_of_tensors(held)
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self._path(step)} cannot be read: {error}", "set averaging to null"
                ) from error
            if not whole:
                raise ModelError(
                    f"{self._path(step)} is damaged: its checksum does not match",
                    "set averaging to null",
                )
            if sums and held.keys() != sums.keys():
                raise ModelError(f"{self._path(step)} belongs to another network", "remove it")
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
        raise ModelError("the kept weights belong to another network", "set averaging to null")
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


def _save_tensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(weights, path, {"sha256": digest_of_tensors(weights)})
    except SafetensorError as error:  # It tells of a full disk by its own.
        raise OSError(str(error)) from error
