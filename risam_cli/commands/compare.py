"""``risam compare``: any number of eval reports side by side."""

from __future__ import annotations

from pathlib import Path

import click

from risam_cli.commands.options import choice, verbosity_options
from risam_cli.errors import UsageError

FORMATS = ("text", "md", "csv", "latex")


FIGURES = (
    *("oiou", "miou", "pr@0.3", "pr@0.5", "pr@0.6", "pr@0.7", "pr@0.8", "pr@0.9"),
    *("giou", "ciou", "n_acc", "t_acc"),
)


def _parse_figures(ctx: click.Context, param: click.Parameter, value: str | None) -> frozenset[str]:
    if value is None:
        return frozenset()
    names = {name.strip().lower().replace("-", "_") for name in value.split(",") if name.strip()}
    for name in sorted(names - {*FIGURES}):
        raise click.BadParameter(f"{name!r}: choose from {', '.join(FIGURES)}.")
    if not names:
        raise click.BadParameter(f"{value!r}: name at least one figure.")
    return frozenset(names)


@click.command("compare")
@click.argument("reports", metavar="[NAME=]REPORT...", nargs=-1, required=True)
@click.option(
    "--to",
    "form",
    type=choice(FORMATS),
    default="text",
    show_default=True,
    help="Format of the table on stdout.",
)
@click.option(
    "--figures",
    "chosen",
    metavar="LIST",
    callback=_parse_figures,
    help="Only these figures, comma separated, such as oiou,miou,pr@0.5.  [default: all]",
)
@click.option("--slices", is_flag=True, help="Also show the differences in each slice.")
@verbosity_options
def command(reports: tuple[str, ...], form: str, chosen: frozenset[str], slices: bool) -> None:
    """Put any number of eval reports side by side, on the expressions that all of them scored.

    REPORT is a report.json of `risam eval`, or its folder; NAME is what its run is called in the
    table. Each run is compared with the first one of its split: the difference of every figure, its
    95 % interval by a bootstrap that is paired by image, and its p-value. Reports of several splits
    give one table each, in LaTeX one table with the splits side by side. A single report gives its
    figures with their own intervals. Figures are per cent; in CSV they are fractions in 0..1.

    \b
    Examples:
      risam compare runs/mine/report runs/florence2/report
      risam compare ours=ours/val --to latex --figures oiou,miou
      risam compare base=base/val base=base/testA ours=ours/val ours=ours/testA --to latex
      risam compare base with --slices --figures miou
    """
    from risam_cli.console.console import get_console
    from risam_cli.evaluation.report.compare import read_other, side_by_side
    from risam_cli.evaluation.report.side_by_side import WRITERS, require_figures

    named = [_named(report) for report in reports]
    tables = side_by_side([(name, read_other(path)) for name, path in named], with_slices=slices)
    require_figures(tables, chosen)
    click.echo(WRITERS[form](tables, chosen), nl=False)
    if form in ("csv", "latex"):  # which have no place for remarks, or none that is read
        for remark in (remark for table in tables for remark in table.remarks):
            get_console().warn(remark)


def _named(text: str) -> tuple[str, Path]:
    """NAME and path of a report; a path may hold "=" too."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        name, path = "", text
    if not path:
        raise UsageError(f"{text!r} names no report (an unset variable?)", "name a folder")
    return name, Path(path)
