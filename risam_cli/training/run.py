"""One training run from settings to the best model, as ``risam train`` starts it."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from risam_cli.console.console import get_console
from risam_cli.errors import ConfigError, OutputError, RisamError
from risam_cli.files.confine import require_own_tree
from risam_cli.files.locks import FolderLock
from risam_cli.files.write import write_atomic
from risam_cli.settings.load import dump
from risam_cli.settings.train import TrainSettings
from risam_cli.training.build import TrainingBuilder
from risam_cli.training.checkpoint import LAST
from risam_cli.training.distributed import Processes
from risam_cli.training.page import PAGE, write_page


def train(
    settings: TrainSettings,
    *,
    resume: bool,
    processes: Processes | None = None,
    command: Sequence[str] = (),
) -> Path:
    """Runs every stage and returns the folder of the best model.

    Args:
        processes: of which this is one; the first one writes.
        command: as it was typed, to be shown in ``training.html``.

    Raises:
        OutputError: the output folder holds another run and ``resume`` is off, or another process
            works in it.
        RisamError: data, weights or settings that do not fit, or a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    processes = processes or Processes()
    with _alone(Path(settings.output), processes):
        return _train(settings, resume, processes, command)


def _train(
    settings: TrainSettings, resume: bool, processes: Processes, command: Sequence[str]
) -> Path:
    console = get_console()
    folder = Path(settings.output)
    resolved = folder / "config.resolved.yaml"
    # All look before one writes.
    if any(processes.gather(resolved.exists())) and not resume:
        raise OutputError(
            f"{folder} holds a training run", "go on with --resume, or --set output=OTHER"
        )
    require_own_tree(folder)
    check_paths(settings)
    builder = TrainingBuilder(settings, console, processes)
    parameters = sum(p.numel() for p in builder.model.parameters())
    several = f" in {processes.world} processes" if processes.world > 1 else ""
    console.info(
        f"{settings.name}: {parameters / 1e6:.2f} M parameters on {builder.device}{several}, "
        f"{str(builder.dtype).removeprefix('torch.')}, output {folder}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resume and processes.leads:
            clear_leftovers(folder)
        run = builder.run(folder)
        if resume:
            run.resume()
        # Only now: a refused --resume must not overwrite the settings that it asks for.
        if processes.leads:
            write_atomic(resolved, lambda part: part.write_text(dump(settings), encoding="utf-8"))
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {error.strerror}", "see space and rights"
        ) from error
    with _page_at_the_end(folder, command, processes), closing(builder):
        run.run([partial(builder.stage, stage) for stage in settings.stages])
    console.info(f"done: best {run.place.best:.4f}, in {folder / 'best'} ({LAST} in checkpoints/)")
    return folder / "best"


@contextmanager
def _alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Holds the output folder against other runs; one in which nothing was begun is not left."""
    if not processes.leads:
        yield
        return
    is_new = not folder.exists()
    try:
        lock = FolderLock(folder)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {error.strerror}", "see space and rights"
        ) from error
    try:
        yield
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _page_at_the_end(folder: Path, command: Sequence[str], processes: Processes) -> Iterator[None]:
    """Writes ``training.html``, however the run ends short of a kill."""
    outcome = "Finished."
    try:
        yield
    except KeyboardInterrupt:
        outcome = "Interrupted."
        raise
    except RisamError as error:
        outcome = f"Ended before its end: {error}"
        raise
    finally:
        if processes.leads:
            try:
                write_page(folder, command, outcome)
            except (OutputError, OSError) as error:
                get_console().warn(f"{PAGE} is not written: {error}")


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written, and puts back what it was about to replace."""
    for name in ("best", "averaged"):
        whole, old = folder / name, folder / f".{name}-old"
        if old.is_dir() and not whole.exists():
            old.rename(whole)
        for half in folder.glob(f".{name}-*"):
            shutil.rmtree(half, ignore_errors=True)
    for part in [*folder.glob(".*.part"), *folder.glob("*/.*.part"), *folder.glob("*/*/.*.part")]:
        part.unlink(missing_ok=True)


def check_paths(settings: TrainSettings) -> None:
    """Looks whether what the settings name is there, before anything is built.

    Raises:
        ConfigError: naming key, path, and a name beside it that is nearly the same.
    """
    for key, path in _paths(settings):
        if path.exists():
            continue
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {str(path.with_name(near[0]))!r}?" if near else "give its path"
        raise ConfigError(f"{key} = {str(path)!r}: nothing is there", hint)


def _paths(settings: TrainSettings) -> Iterator[tuple[str, Path]]:
    if settings.init_from is None and settings.model.image_encoder.checkpoint is not None:
        yield "model.image_encoder.checkpoint", Path(settings.model.image_encoder.checkpoint)
    for key, data in [
        ("train", settings.train),
        *((f"val.{name}", data) for name, data in settings.val.items()),
    ]:
        for part, path in data.paths():
            yield f"{key}.{part}", path
