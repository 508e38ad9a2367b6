"""``risam compare``: any number of eval reports side by side."""

from __future__ import annotations

from pathlib import Path

import click

from risam_cli.commands.options import verbosity_options
from risam_cli.errors import UsageError

FORMATS = ("text", "md", "csv", "latex")


@click.command("compare")
@click.argument(
    "reports", metavar="REPORT...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--to",
    "form",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="How the table is written, on stdout.",
)
@verbosity_options
def command(reports: tuple[Path, ...], form: str) -> None:
    """Put any number of eval reports side by side, on the expressions that all of them scored.

    REPORT is a report.json of `risam eval`, or its folder. Each run is held against the first one:
    the difference of every figure, its 95 % interval by a bootstrap that is paired by image, and
    its p-value. Figures are per cent; in CSV they are fractions in 0..1.

    \b
    Examples:
      risam compare runs/mine/report runs/florence2/report
      risam compare base with without --to latex > table.tex
    """
    from risam_cli.evaluation.report.compare import read_other, side_by_side
    from risam_cli.evaluation.report.side_by_side import WRITERS

    if len(reports) < 2:
        raise UsageError("one report alone has nothing beside it", "name two or more")
    table = side_by_side([read_other(path) for path in reports])
    click.echo(WRITERS[form](table), nl=False)
