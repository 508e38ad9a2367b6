"""``risam train``: from a YAML file to a model folder."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from risam_cli.commands.options import LocalPath, verbosity_options
from risam_cli.console.console import get_console
from risam_cli.errors import UsageError

if TYPE_CHECKING:
    from risam_cli.settings.data import DataSettings
    from risam_cli.settings.train import TrainSettings


@click.command(name="train")
@click.argument("config", type=LocalPath())
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting, such as --set optimizer.ema_decay=0. Repeatable.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps of each stage, for a short run.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue from the last checkpoint of the same run; CONFIG may be its folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
@click.option("--print-config", is_flag=True, help="Print the whole configuration and stop.")
@verbosity_options
def command(
    config: Path,
    overrides: tuple[str, ...],
    steps: int | None,
    resume: bool,
    overwrite: bool,
    print_config: bool,
) -> int | None:
    """Train a model by the settings in CONFIG, a YAML file.

    The file is checked as a whole before anything loads. Writes checkpoints/, metrics.jsonl,
    config.resolved.yaml, tensorboard/, pictures/, training.html and best/, a folder that --model
    takes. Ctrl-C ends it after the current step, with a checkpoint; a second Ctrl-C at once.

    \b
    Examples:
      risam train configs/refshapes_tiny.yaml
      risam train configs/refshapes_tiny.yaml --set seed=1 --set output=runs/seed1
      risam train --resume runs/seed1
      torchrun --nproc-per-node 2 -m risam_cli train configs/refshapes_tiny.yaml
    """
    from risam_cli.settings.load import dump
    from risam_cli.settings.train import load_settings
    from risam_cli.weights.folder import stored_settings

    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "give one of them")
    if resume and not config.suffix and not config.exists():
        raise UsageError(f"{config}: no such file or folder", "give the output folder of a run")
    if config.is_dir():
        config, overrides = _run_of(config, overrides, resume)
    if steps is not None:
        overrides = (*overrides, f"stages.*.steps={steps}")
    read = partial(load_settings, config, overrides, stored=stored_settings)
    if print_config:
        click.echo(dump(read()), nl=False)
        return None
    # A misspelt key is told of before torch is imported, unless several processes of torchrun, of
    # which one is to speak, would tell it.
    settings = read() if os.environ.get("WORLD_SIZE", "1") == "1" else None
    if settings is None:
        # Or DDP remarks, once a process, that it looked for unused parameters and found none.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from risam_cli.training.distributed import Told, joined
    from risam_cli.training.loop import train

    try:
        with joined() as processes:
            typed = ["risam", *sys.argv[1:]]
            settings = settings or read()
            best = train(
                settings,
                resume=resume,
                overwrite=overwrite,
                processes=processes,
                command=typed,
            )
            if best.is_dir():
                how = f'risam predict IMAGES -e "EXPRESSION" --model {quote(str(best))} -o masks'
                get_console().info(f"use it: {how}")
                for line in scoring_commands(settings, best):
                    get_console().info(f"score it: {line}")
    except Told as told:
        return told.exit_code
    return None


def _run_of(folder: Path, overrides: tuple[str, ...], resume: bool) -> tuple[Path, tuple[str, ...]]:
    """The settings that a run has stored in its folder, wherever that lies now."""
    stored = folder / "config.resolved.yaml"
    if not resume:
        raise UsageError(
            f"{folder} is a folder", "give a YAML file, or --resume with the folder of a run"
        )
    if not stored.is_file():
        raise UsageError(f"{folder} holds no training run", "give the output folder of one")
    return stored, (f"output={json.dumps(str(folder))}", *overrides)


def scoring_commands(settings: TrainSettings, model: Path) -> Iterator[str]:
    """The calls of ``risam eval`` that score a model on what its training validated on.

    There is none for scenes that eval does not draw: of a kind or a seed that it does not have.
    Where training looked at some images of a set alone, eval scores all of them.
    """
    for name, data in settings.val.items():
        if (asked := _evaluated(data)) is None:
            continue
        own = re.sub(r"[^\w.-]+", "_", f"-{name}") if len(settings.val) > 1 else ""
        report = f"{Path(settings.output)}-eval{own}"
        typed = ["risam", "eval", *asked, "--model", str(model), "-o", report]
        yield " ".join(map(quote, typed))


def _evaluated(data: DataSettings) -> list[str] | None:
    """The options of ``risam eval`` that open the same data."""
    if data.dataset == "mixed":
        return None
    if data.dataset == "refshapes":
        if (
            data.family == "mixed"
            or data.seed
            or (data.variety == "wide" and data.split != "testC")
        ):
            return None
        return ["--dataset", "refshapes", "--family", data.family, "--split", data.split]
    given = data.model_dump(exclude_none=True)
    asked = ["--dataset", data.dataset, "--root", given.get("annotations") or given["root"]]
    if (given["dataset"], given["split"]) == ("coco", "all"):
        del given["split"]
    if "bands" in given:
        given["bands"] = ",".join(map(str, given["bands"]))
    for key in ("split", "split_by", "images", "bands", "only_every", "leave_out_every"):
        asked += [f"--{key.replace('_', '-')}", str(given[key])] if key in given else []
    return asked
