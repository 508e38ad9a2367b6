"""Messages speak of settings by key, and each front end puts its own name there."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image
from support.cli import Cli
from support.paths import REPO

import risam_cli
from risam_cli.api.model import parameter_name
from risam_cli.cli import COMMANDS, root
from risam_cli.commands.options import option_names
from risam_cli.errors import (
    DataError,
    ImageError,
    RisamError,
    UsageError,
    keyword,
    setting,
    told,
    use_front_end,
)
from risam_cli.settings.train import TrainSettings

PACKAGE = REPO / "risam_cli"
BELOW = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if PACKAGE / "commands" not in path.parents and path != PACKAGE / "cli.py"
]


def commands(command: click.Command = root) -> Iterator[click.Command]:
    """Every command and its subcommands."""
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found)


OPTIONS = {
    name
    for command in commands()
    for parameter in command.params
    for name in parameter.opts
    if name.startswith("-")
}


@pytest.mark.parametrize("path", BELOW, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_layer_below_the_commands_names_an_option(path: Path) -> None:
    words = {
        word
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*", node.value)
    }
    assert words & (OPTIONS - {"-m"}) == set()  # `python -m` is Python's own


def test_a_key_is_the_name_of_a_parameter() -> None:
    keys = {
        node.args[0].value
        for path in BELOW
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "setting"
        and isinstance(node.args[0], ast.Constant)
    }
    known = {option.lstrip("-").replace("-", "_") for option in OPTIONS}
    known |= {parameter.name for command in commands() for parameter in command.params}
    known |= set(TrainSettings.model_fields)
    assert len(keys) > 20
    assert keys - known == set()


def test_an_error_holds_keys_and_says_what_the_front_end_says() -> None:
    error = UsageError(f"{setting('split_by', 'umd')} is no such thing", f"see {setting('root')}")
    assert error.settings == ("split_by", "root")
    assert error.named(keyword) == ("split_by=umd is no such thing", "see root")
    assert error.named(lambda key, value: f"data.{key}") == (
        "data.split_by is no such thing",
        "see data.root",
    )


def test_a_way_out_that_a_front_end_has_not_is_left_out() -> None:
    error = DataError("no file", "check the path", f"give {setting('image_root')}", "")
    assert error.named(keyword) == ("no file", "check the path, or give image_root")
    assert error.named(lambda key, value: None) == ("no file", "check the path")


def test_an_error_comes_whole_out_of_another_process() -> None:
    error = ImageError("a.png: no such file", "check the path", f"give {setting('image_root')}")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args) == (ImageError, error.args)
    assert told(error.raw) == str(error)
    assert "\x1e" not in str(error)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_its_own_options_only(name: str) -> None:
    command = root.get_command(click.Context(root), name)
    assert command is not None
    name_of = option_names(command)
    assert name_of("quiet", "") == "--quiet"
    own = {option for parameter in command.params for option in parameter.opts}
    assert name_of("overwrite", "True") == ("--overwrite" if "--overwrite" in own else None)
    paths = {"predict": "--image-root", "eval": "--images", "export-masks": "--image-root"}
    assert name_of("image_root", "") == paths.get(name)


def test_one_missing_image_is_told_of_in_the_words_of_each_front_end(
    cli: Cli, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.png"
    done = cli("predict", str(gone), "-e", "x", "-o", str(tmp_path / "out"))
    assert "--image-root" in (tmp_path / "out" / "failures.jsonl").read_text() + done.stderr
    done = cli("explain", str(gone), "-e", "x", "-o", str(tmp_path / "why"))
    assert "check the path" in done.stderr
    assert "image" + "_root" not in done.stderr.replace("-", "_")
    use_front_end(parameter_name)
    with pytest.raises(RisamError, match=r"check the path$"):
        risam_cli.load().predict(gone, "x")


def test_one_wrong_device_is_told_of_in_the_words_of_each_front_end(
    cli: Cli, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = cli("predict", str(tmp_path), "-e", "x", "--device", "mps", "-o", str(tmp_path / "o"))
    assert "--device mps: this machine has no MPS; use --device auto" in done.stderr
    use_front_end(parameter_name)
    with pytest.raises(UsageError, match=r"^device=mps: .* no MPS; use device=auto$"):
        risam_cli.load(device="mps")
