"""One training run from settings to the best model, as ``risam train`` starts it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from risam_cli.build_training import TrainingBuilder
from risam_cli.config import TrainSettings, dump
from risam_cli.console import get_console
from risam_cli.engine.train import LAST
from risam_cli.errors import OutputError


def train(settings: TrainSettings, *, resume: bool) -> Path:
    """Runs every stage and returns the folder of the best model.

    Raises:
        OutputError: the output folder holds another run and ``resume`` is off.
        RisamError: data, weights or settings that do not fit, or a loss that is not finite.
    """
    console = get_console()
    folder = Path(settings.output)
    resolved = folder / "config.resolved.yaml"
    if resolved.exists() and not resume:
        raise OutputError(
            f"{folder} holds a training run", "go on with --resume, or --set output=OTHER"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved.write_text(dump(settings), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {error.strerror}", "see space and rights"
        ) from error
    builder = TrainingBuilder(settings, console)
    parameters = sum(p.numel() for p in builder.model.parameters())
    console.info(
        f"{settings.name}: {parameters / 1e6:.2f} M parameters on {builder.device}, "
        f"{str(builder.dtype).removeprefix('torch.')}, output {folder}"
    )
    run = builder.run(folder)
    if resume:
        run.resume()
    run.run([partial(builder.stage, stage) for stage in settings.stages])
    console.info(f"done: best {run.place.best:.4f}, in {folder / 'best'} ({LAST} in checkpoints/)")
    return folder / "best"
