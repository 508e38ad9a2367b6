"""``risam models``: list, inspect, verify, fetch and export models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import click

from risam_cli.commands import completing
from risam_cli.commands.options import LocalPath, json_option, verbosity_options
from risam_cli.console.console import get_console
from risam_cli.console.text import sanitize
from risam_cli.errors import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_SOME_FAILED,
    ModelError,
    RisamError,
    UsageError,
)

Row = dict[str, Any]


@click.group("models")
@verbosity_options
def command() -> None:
    """List, inspect, verify, fetch and export models.

    A model folder is what `risam train` writes and what --model takes: its settings, its weights,
    its tokenizer and a card that says how it was made. Nothing in it is ever executed. One that
    was tuned beside frozen weights names the files it needs, by size and SHA-256; they are looked
    for in the folder, beside it, and in the folders of the variable RISAM_WEIGHTS.

    \b
    Examples:
      risam models list --dir runs
      risam models inspect runs/mine/best
    """


@command.command("list")
@click.option(
    "--dir",
    "folders",
    metavar="DIR",
    multiple=True,
    type=LocalPath(file_okay=False),
    help="Also list the model folders below DIR; may be given several times.",
)
@json_option
@verbosity_options
def list_models(folders: tuple[Path, ...], as_json: bool) -> int:
    """List the bundled models, those below each --dir, and the published ones that have a name.

    For a published model it shows whether it is in the Hugging Face cache and needs no network, its
    licence, what it is good at, and its publishers' own figures. A folder that looks
    like a model but cannot be read is listed with the reason (exit code 3).

    \b
    Examples:
      risam models list
      risam models list --dir runs --dir /data/models --json
    """
    from risam_cli.weights import folder as model_folders

    found = [(name, model_folders.BUNDLED / name) for name in model_folders.bundled_models()]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--dir {folder}: no such folder")
        found += [(str(path), path) for path in _below(folder)]
    rows = [_row(name, path) for name, path in found]
    published = _published()
    if as_json:
        click.echo(json.dumps(rows + published, indent=2, ensure_ascii=False))
    else:
        if rows:
            head = ("model", "parameters", "size", "hash")
            click.echo(_table(head, [_cells(row) for row in rows]) + "\n")
        names = ("published", "here", "parameters", "licence", "good at", "publishers' figures")
        click.echo(_table(names, [_published_cells(row) for row in published]))
    return EXIT_SOME_FAILED if any(row["problem"] for row in rows) else EXIT_OK


@command.command("inspect")
@click.argument("model", metavar="[NAME|PATH]", required=False, shell_complete=completing.models)
@click.option("--tensors", is_flag=True, help="List every tensor with its type and shape.")
@json_option
@verbosity_options
def inspect(model: str | None, tensors: bool, as_json: bool) -> None:
    """Show what a model folder holds: card, settings, parameters by part.

    Reads headers only, so it is quick for models of any size. Without an argument: the bundled
    model.

    \b
    Examples:
      risam models inspect
      risam models inspect runs/mine/best --tensors
    """
    from risam_cli.segmenters.resolve import parse_model
    from risam_cli.weights import folder as model_folders
    from risam_cli.weights import frozen

    named = parse_model(model)
    if named.kind != "risam":
        from risam_cli.segmenters.inspect import inspect_published

        _show(inspect_published(named), as_json)
        return
    folder = model_folders.find_model(model)
    facts = model_folders.inspect_model_folder(folder)
    # Nothing of the list is shown before it was looked through.
    needs = frozen.parse_needed(facts["needs"], str(folder / model_folders.CONFIG_FILE))
    facts["needs"] = frozen.plain(needs)
    if tensors:
        facts["tensors"] = _tensors(folder / model_folders.WEIGHTS_FILE)
    _show(facts, as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    """What a model holds, on stdout."""
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(f"path        {sanitize(facts['path'])}")
    if "kind" in facts:
        click.echo(f"kind        {facts['kind']}")
    click.echo(f"hash        {facts['hash']}")
    click.echo(f"size        {_size(facts['bytes'])}")
    click.echo(f"parameters  {facts['parameters']:,}")
    for part, count in facts["parameters_by_part"].items():
        click.echo(f"  {sanitize(part):<28} {count:>14,}")
    for needed in facts["needs"]:
        click.echo(
            f"needs       {sanitize(needed['name'])}, {_size(needed['size'])}, "
            f"SHA-256 {sanitize(needed['sha256'])}"
        )
    for title in ("settings", "card"):
        if facts[title]:
            # Through JSON, because YAML writes only plain types.
            plain = json.loads(json.dumps(facts[title], default=str))
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=96)
            click.echo(f"\n{title}\n" + sanitize(indent(text.rstrip(), "  "), keep_newlines=True))
    if "tensors" in facts:
        rows = [(t["name"], t["dtype"], "x".join(map(str, t["shape"]))) for t in facts["tensors"]]
        click.echo("\n" + _table(("tensor", "type", "shape"), rows))


@command.command("verify")
@click.argument("model", metavar="[NAME|PATH]", required=False, shell_complete=completing.models)
@json_option
@verbosity_options
def verify(model: str | None, as_json: bool) -> int:
    """Check a model folder: every file, every tensor, and that they fit each other.

    The weights are loaded just as `risam predict` loads them, and checked for values that are
    not finite. Exit code 1 if anything is wrong, with one line for each problem.

    \b
    Examples:
      risam models verify
      risam models verify runs/mine/best --json
    """
    from risam_cli.segmenters.resolve import parse_model
    from risam_cli.weights import folder as model_folders
    from risam_cli.weights.load import verify_model_folder

    named = parse_model(model)
    if named.kind == "risam":
        folder = model_folders.find_model(model)
        where = str(folder)
        try:
            problems = verify_model_folder(folder)
        except RisamError as error:  # such as settings that are out of range
            problems = [str(error)]
        digest = None if problems else model_folders.hash_folder(folder)
        if not problems and not model_folders.checksums(folder):
            get_console().warn(
                f"{where}: no checksums in {model_folders.CARD_FILE}: a changed weight goes unseen"
            )
    else:
        from risam_cli.segmenters.inspect import verify_published

        where, digest, problems = verify_published(named, str(model))
    if as_json:
        facts = {"path": where, "ok": not problems, "hash": digest, "problems": problems}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    elif not problems:
        click.echo(f"ok  {sanitize(where)}  {digest}")
    for problem in problems:
        get_console().error(problem)
    return EXIT_ERROR if problems else EXIT_OK


@command.command("fetch")
@click.argument("model", metavar="NAME", shell_complete=completing.models)
@verbosity_options
def fetch(model: str) -> None:
    """Download a published model ahead of its use, into the Hugging Face cache.

    NAME is a short name, a name on the Hugging Face hub, or KIND:NAME[+SECOND]. What is
    already there is not downloaded again. Prints the folder of each part.

    \b
    Examples:
      risam models fetch florence2
      risam models fetch grounded-sam:IDEA-Research/grounding-dino-base+facebook/sam-vit-large
    """
    from risam_cli.segmenters.resolve import find_folders, parse_model

    named = parse_model(model)
    if named.kind == "risam":
        raise UsageError(f"{model} is already on this machine", "name a published model")
    _, folders = find_folders(named)
    for folder in folders:
        click.echo(str(folder))


@command.command("export")
@click.argument("model", metavar="[NAME|PATH]", required=False, shell_complete=completing.models)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    required=True,
    type=LocalPath(file_okay=False),
    help="The new model folder; must not exist yet, or be empty.",
)
@click.option(
    "--merged",
    is_flag=True,
    help="Include the frozen weights that the folder refers to, and merge LoRA into the "
    "text encoder.",
)
@verbosity_options
def export(model: str | None, output: Path, merged: bool) -> None:
    """Write a model folder to another place, whole with --merged.

    A folder that `risam train` wrote beside a frozen SAM file or text encoder holds what was
    trained; with --merged everything is in it, and it can be given away as it is.

    \b
    Examples:
      risam models export runs/mine/best --merged -o mine-whole
      risam models export refshapes-tiny -o copy
    """
    from risam_cli.weights import folder as model_folders
    from risam_cli.weights.export import export_model

    export_model(model, output, merged=merged)
    digest = model_folders.hash_folder(output)
    get_console().info(f"wrote {output}, hash {digest}")


def _below(folder: Path) -> Iterator[Path]:
    """Folders at or below ``folder`` that hold a model's settings and weights, by name."""
    from risam_cli.weights import folder as model_folders

    for path in sorted(folder.rglob(model_folders.WEIGHTS_FILE)):
        if (path.parent / model_folders.CONFIG_FILE).is_file():
            yield path.parent


def _row(name: str, path: Path) -> Row:
    from risam_cli.weights import folder as model_folders

    row: Row = {"name": name, "path": str(path), "problem": None}
    try:
        facts = model_folders.inspect_model_folder(path)
    except ModelError as error:
        return {**row, "problem": str(error)}
    return {**row, **{key: facts[key] for key in ("hash", "bytes", "parameters")}}


def _published() -> list[Row]:
    """The published models that have a short name, and whether they are in the cache."""
    from risam_cli.segmenters.hub import cached
    from risam_cli.segmenters.names import KNOWN

    rows = []
    for one in KNOWN.values():
        paths = [cached(part) for part in one.parts]
        rows.append(
            {
                "name": one.short,
                "kind": one.kind,
                "path": None if None in paths else " + ".join(map(str, paths)),
                "problem": None,
                "state": "to fetch" if None in paths else "cached",
                "parts": list(one.parts),
                "parameters": round(one.parameters * 1e9),
                "licence": one.licence,
                "gated": one.gated,
                "good_at": one.good_at,
                "published_figures": one.figures,
            }
        )
    return rows


def _published_cells(row: Row) -> tuple[str, ...]:
    licence = row["licence"] + (", gated" if row["gated"] else "")
    size = f"{row['parameters'] / 1e9:.2f} B"
    return (row["name"], row["state"], size, licence, row["good_at"], row["published_figures"])


def _cells(row: Row) -> tuple[str, ...]:
    if row["problem"]:
        return (row["name"], row["problem"])
    return (row["name"], f"{row['parameters']:,}", _size(row["bytes"]), row["hash"][:12])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces; a row may be shorter than the head, its last cell then runs on."""
    safe = [[sanitize(cell) for cell in row] for row in rows]
    full = [head, *(row for row in safe if len(row) == len(head))]
    widths = [max(len(row[k]) for row in full) for k in range(len(head))]
    if safe:
        widths[0] = max(widths[0], *(len(row[0]) for row in safe))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in [head, *safe]
    )


def _tensors(weights: Path) -> list[dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as file:
        names = sorted(file.keys())
        slices = [file.get_slice(name) for name in names]
    return [
        {"name": name, "dtype": part.get_dtype(), "shape": list(part.get_shape())}
        for name, part in zip(names, slices, strict=True)
    ]


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
