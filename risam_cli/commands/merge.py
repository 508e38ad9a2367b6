"""``risam merge``: the output folders of shards, put together."""

from __future__ import annotations

import json
from pathlib import Path

import click

from risam_cli.commands.options import LocalPath, json_option, output_option, verbosity_options
from risam_cli.console.console import get_console
from risam_cli.console.text import counted
from risam_cli.errors import EXIT_OK, EXIT_SOME_FAILED


@click.command(name="merge")
@click.argument(
    "folders",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=LocalPath(exists=True, file_okay=False),
)
@output_option(None)
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@json_option
@verbosity_options
def command(folders: tuple[Path, ...], output: Path, overwrite: bool, as_json: bool) -> int:
    """Merge the output folders of all shards of one run.

    DIR is the output folder of `risam predict --shard I/N`, or a folder that holds all of them, as
    made by torchrun with --no-merge. The result is what one run without shards would have written,
    byte for byte (except for times in run.json), and can be resumed and exported like it.

    Shards of different inputs, models or settings, unfinished shards, and sets with a missing or
    duplicate shard are refused. If items failed in the shards, the exit code is 3, as without
    shards.

    \b
    Examples:
      risam merge part0 part1 part2 -o whole
      risam merge ranks -o whole --overwrite   # ranks: what torchrun wrote to
    """
    from risam_cli.runs.merge import find_parts, merge_parts

    console = get_console()
    parts = find_parts(folders)
    with console.progress("merge", parts[0].entries, "inputs") as progress:
        merged = merge_parts(parts, output, overwrite=overwrite, advance=progress.advance)
    console.info(
        f"{counted(merged.records, 'record')} of {counted(len(parts), 'shard')} in {output}"
    )
    if merged.failures:
        console.warn(f"{counted(merged.failures, 'item')} failed: see {output / 'failures.jsonl'}")
    if as_json:
        click.echo(
            json.dumps(
                {
                    "output": str(output),
                    "shards": len(parts),
                    "inputs": merged.entries,
                    "records": merged.records,
                    "failures": merged.failures,
                    "files": merged.files,
                }
            )
        )
    return EXIT_SOME_FAILED if merged.failures else EXIT_OK
