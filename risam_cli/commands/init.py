"""``risam init``: a YAML file to train on one's own data with."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from risam_cli.commands.options import LocalPath, verbosity_options

_USAGE = """\
#   risam train {file} --steps 20     # a first try
#   risam train {file} --overwrite    # the whole
#   risam train --resume {output}     # continues where it was cut
#   risam predict IMAGES -e "..." --model {output}/best -o masks
#
# Training ends with the command that scores the model on the images of `val`.
#
# Paths are relative to the folder that the command runs in. --print-config prints every setting
# with its default.
"""


@click.command(name="init")
@click.argument("annotations", type=LocalPath())
@click.option(
    "--images",
    type=LocalPath(),
    metavar="DIR",
    help="Folder that image file names are relative to.  [default: beside ANNOTATIONS, or in "
    "images/]",
)
@click.option(
    "-o",
    "--output",
    type=LocalPath(),
    metavar="FILE",
    default=Path("train.yaml"),
    show_default=True,
    help="The file to write.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@verbosity_options
def command(annotations: Path, images: Path | None, output: Path, overwrite: bool) -> None:
    """Write a commented YAML file that trains on your own data.

    ANNOTATIONS is a COCO-style JSON file of images, masks and expressions. Its content
    determines the settings: which images are held out, whether words must be learned, how many
    steps make a first try. Nothing else is needed to train.

    \b
    Examples:
      risam init my.json
      risam init labels/instances.json --images photos -o cups.yaml
    """
    from risam_cli.console.console import get_console
    from risam_cli.errors import OutputError, setting
    from risam_cli.files.write import write_file
    from risam_cli.training.starter import starter_file

    if output.is_dir():
        raise OutputError(f"{output} is a folder", f"give a file by {setting('output')}")
    if output.exists() and not overwrite:
        raise OutputError(
            f"{output} already exists",
            f"choose another {setting('output')}",
            f"give {setting('overwrite')}",
        )
    text = starter_file(annotations, images, output, _USAGE)
    write_file(output, text.encode("utf-8"))
    console = get_console()
    console.info(f"wrote {output}")
    console.info(f"a first try: risam train {shlex.quote(str(output))} --steps 20")
