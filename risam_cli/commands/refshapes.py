"""``risam refshapes``: writes the procedural data set in the benchmarks' own formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from risam_cli.commands import completing
from risam_cli.commands.options import choice, json_option, output_option, verbosity_options
from risam_cli.console.console import get_console
from risam_cli.console.text import counted
from risam_cli.errors import EXIT_OK, OutputError

# Said here again, and held to the data set's own by a test, so that --help imports little.
FAMILIES = ("refshapes", "refshapes+", "refshapesg", "grefshapes")
SPLITS = ("train", "val", "testA", "testB", "testC")
FORMATS = ("own", "refer", "grefcoco", "phrasecut", "coco")
IMAGE_FORMATS = ("jpg", "png")


def _check_splits(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    known = {name.lower(): name for name in SPLITS}
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    for name in names:
        if name.lower() not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(SPLITS)}.")
    return tuple(dict.fromkeys(known[name.lower()] for name in names))


@click.command("refshapes")
@output_option(None)
@click.option(
    "--family",
    type=choice((*FAMILIES, "all")),
    default="all",
    show_default=True,
    help="Modelled on RefCOCO, RefCOCO+ (no place words), G-Ref (relations), gRefCOCO (several or "
    "none).",
)
@click.option(
    "--splits",
    metavar="LIST",
    default="val,testA,testB",
    show_default=True,
    callback=_check_splits,
    shell_complete=completing.comma_list(SPLITS),
    help="Comma separated: train, val, testA (crowded), testB (unseen shape and colour pairs), "
    "testC (unseen looks and wording).",
)
@click.option(
    "--scenes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Scenes per split.  [default: train 40000, the others 500]",
)
@click.option(
    "--expressions",
    type=click.IntRange(min=1),
    metavar="N",
    default=6,
    show_default=True,
    help="Expressions per scene.",
)
@click.option(
    "--size",
    type=click.IntRange(min=128),
    metavar="PIXELS",
    default=256,
    show_default=True,
    help="Height and width of a scene.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed; another one draws other scenes.",
)
@click.option(
    "--format",
    type=choice(FORMATS),
    default="own",
    show_default=True,
    help="own means refer, or grefcoco for grefshapes.",
)
@click.option(
    "--image-format",
    type=choice(IMAGE_FORMATS),
    default="jpg",
    show_default=True,
    help="jpg is named like the benchmarks' images; png keeps every pixel.",
)
@click.option(
    "--polygons",
    is_flag=True,
    help="Write masks as polygons, with bridged holes, if these are exact; for loaders that cannot "
    "read RLE.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run wrote.")
@json_option
@verbosity_options
def command(
    output: Path,
    family: str,
    overwrite: bool,
    as_json: bool,
    **drawn: Any,
) -> int:
    """Write RefShapes, the procedural data set: scenes of shapes, phrases and exact masks.

    In its benchmark's own format a family goes to DIR/refcoco, DIR/refcoco+, DIR/refcocog or
    DIR/grefcoco; in any other to DIR/FAMILY/FORMAT. `risam eval` reads all of them.

    \b
    Examples:
      risam refshapes -o data --family grefshapes --splits val
      risam refshapes -o data --family refshapes --format coco --scenes 100 --image-format png
    """
    from risam_cli.data.refshapes.writers import Plan, write_family

    families = FAMILIES if family == "all" else (family,)
    plans = [Plan(name, **drawn) for name in families]
    taken = [str(output / plan.folder) for plan in plans if (output / plan.folder).exists()]
    if taken and not overwrite:
        raise OutputError(
            f"{', '.join(taken)} {'exists' if len(taken) == 1 else 'exist'} already",
            "choose another -o or give --overwrite",
        )
    console = get_console()
    written = []
    for plan in plans:
        total = sum(len(split) for split in plan.sets())
        with console.progress(plan.family, total, "scenes") as progress:
            about = write_family(plan, output, overwrite=overwrite, on_scene=progress.advance)
        counts = about["counts"]
        console.info(
            f"{about['folder']}: {counted(counts['images'], 'image')}, "
            f"{counted(counts['expressions'], 'expression')}"
            f" ({counts['several']} of several objects, {counts['no_target']} of none)"
        )
        if counts["left_out"]:
            console.warn(
                f"{counts['left_out']} phrases without a target are not written: "
                "PhraseCut's format cannot express them"
            )
        if counts.get("kept_as_rle"):
            console.warn(
                f"{counts['kept_as_rle']} of {counts['annotations']} masks cannot be written "
                "exactly as polygons and stay RLE"
            )
        written.append(about)
    if as_json:
        click.echo(json.dumps(written, indent=2))
    return EXIT_OK
