"""``risam eval``: scores a model, or anyone's masks, on a benchmark."""

from __future__ import annotations

from typing import Any

import click

from risam_cli.commands.options import (
    UNIT,
    LocalPath,
    Place,
    bands_option,
    batch_options,
    cache_options,
    choice,
    compile_option,
    confine_option,
    decode_option,
    device_options,
    instance_options,
    json_option,
    model_option,
    output_option,
    run_mode_options,
    verbosity_options,
)

# Said here again, and held to the modules' own by a test, so that --help imports little.
DATASETS = (
    "refcoco",
    "refcoco+",
    "refcocog",
    "refclef",
    "grefcoco",
    "phrasecut",
    "coco",
    "refshapes",
)
FAMILIES = ("refshapes", "refshapes+", "refshapesg", "grefshapes")
PROTOCOLS = ("native", "lavt", "cris", "gres", "lisa", "phrasecut")


@click.command("eval")
@click.option("--dataset", type=choice(DATASETS), required=True, help="What to score on.")
@click.option(
    "--root",
    type=Place(),
    metavar="DIR",
    help="The folder that holds refcoco/, refcoco+/ …, or the data set's own folder. For coco also "
    "the JSON file. Without it, refshapes is drawn on the fly.",
)
@click.option(
    "--images",
    "image_root",
    type=Place(file_okay=False),
    metavar="DIR",
    help="Folder that image file names are relative to.  [default: looked for near --root]",
)
@click.option(
    "--split",
    metavar="NAME",
    help="val, test, testA …  [default: the only one there is; for coco all]",
)
@click.option(
    "--split-by",
    type=choice(("unc", "umd", "google", "berkeley")),
    help="Who made the splits.  [default: unc; refcocog: umd]",
)
@click.option("--family", type=choice(FAMILIES), help="Of refshapes.  [default: refshapes]")
@model_option
@click.option(
    "--predictions",
    type=LocalPath(allow_dash=True),
    metavar="FILE",
    help="Score these instead of a model: predictions.jsonl, its folder, COCO results, a folder of "
    "masks with a manifest, or -.",
)
@click.option(
    "--protocol",
    "protocol_name",
    type=choice(PROTOCOLS),
    default="native",
    show_default=True,
    help="How masks are compared; every report prints the definition.",
)
@output_option("risam-eval")
@click.option(
    "--compare",
    type=LocalPath(),
    metavar="REPORT",
    help="Another report.json or its folder: both runs side by side, paired by expression.",
)
@click.option(
    "--fit-no-target",
    is_flag=True,
    help="Choose the model's no-target threshold on this split and store it in its folder.",
)
@click.option(
    "--only-every",
    type=click.IntRange(min=2),
    metavar="N",
    help="Score only the first of every N images: what training held out with only_every: N.",
)
@click.option(
    "--leave-out-every",
    type=click.IntRange(min=2),
    metavar="N",
    help="Score all but the first of every N images.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Score at most N expressions."
)
@click.option(
    "--shuffle",
    type=click.IntRange(min=0),
    metavar="SEED",
    help="Shuffle the images with this seed, for a quick look with --limit.",
)
@click.option(
    "--slice",
    "slices",
    multiple=True,
    metavar="NAME[:BINS]",
    help="Also report figures by length (words) or size (% of the image) in bins, such as "
    "length:1-3,4-7, or a column of the data, such as weather or weather:sun,rain. Repeatable.",
)
@click.option("--skip-missing", is_flag=True, help="Do not exit with 3 because of missing images.")
@click.option(
    "--threshold",
    help="A model's mask threshold instead of the protocol's; the report says so.",
    **UNIT,
)
@click.option(
    "--no-target-threshold",
    help="A model's no-target threshold.  [default: the model's]",
    **UNIT,
)
@instance_options
@device_options
@compile_option
@batch_options
@cache_options
@decode_option
@bands_option
@confine_option(
    "Refuse images outside of --images, or of the data's folder, and mask files outside of their "
    "list's folder: for files from strangers."
)
@run_mode_options
@json_option
@verbosity_options
def command(**options: Any) -> int:
    """Score a model, or anyone's masks, on a benchmark, by a named protocol.

    Writes report.json, report.md, report.html and per_expression.jsonl to DIR, and prints the
    figures on stderr; with --json also to stdout, as fractions in 0..1.

    \b
    Examples:
      risam eval --dataset refshapes --split val -o report
      risam eval --dataset refcoco --root data --split testA --model runs/mine/best -o report
      risam eval --dataset coco --root my.json --only-every 5 --model runs/mine/best -o report
      risam eval --dataset grefcoco --root data --split val --predictions out --protocol gres
    """
    from risam_cli.evaluation.flow import evaluate
    from risam_cli.evaluation.request import EvalRequest

    return evaluate(EvalRequest(**options))
