"""``risam train``: from a YAML file to a model folder."""

from __future__ import annotations

from pathlib import Path

import click

from risam_cli.commands.options import verbosity_options


@click.command(name="train")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting, such as --set optimizer.ema_decay=0. Repeatable.",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of the same run.")
@click.option("--print-config", is_flag=True, help="Print the whole configuration and stop.")
@verbosity_options
def command(config: Path, overrides: tuple[str, ...], resume: bool, print_config: bool) -> None:
    """Train a model as CONFIG, a YAML file, says.

    The file is checked as a whole before anything loads. Writes checkpoints/, metrics.jsonl,
    config.resolved.yaml, tensorboard/ and best/, a folder that --model takes.

    \b
    Examples:
      risam train configs/refshapes_tiny.yaml
      risam train configs/refshapes_tiny.yaml --set seed=1 --set output=runs/seed1 --resume
    """
    from risam_cli.config import dump, load_settings

    settings = load_settings(config, overrides)
    if print_config:
        click.echo(dump(settings), nl=False)
        return
    from risam_cli.training import train

    train(settings, resume=resume)
