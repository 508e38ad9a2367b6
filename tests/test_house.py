"""The rules of the house that ruff, mypy and import-linter do not see."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import REPO

from risam_cli.cli import COMMANDS

MAX_FILE = 600  # lines of the package's files; tests are lists of cases and may be longer
MAX_TEST_FILE = 700
MAX_FUNCTION = 60  # lines, without its docstring

PACKAGE = sorted((REPO / "risam_cli").rglob("*.py"))
ALL = sorted(
    path
    for folder in ("risam_cli", "tests", "benchmarks", "docs", "sample_data")
    for path in (REPO / folder).rglob("*.py")
)


def _name(path: Path) -> str:
    return str(path.relative_to(REPO))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_a_module_says_what_it_is_for_and_postpones_annotations(path: Path) -> None:
    tree = _tree(path)
    if not tree.body:  # an empty __init__.py
        return
    assert ast.get_docstring(tree), "no docstring"
    assert path.name == "__init__.py" or any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in tree.body
    ), "no `from __future__ import annotations`"


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_nothing_imports_torchvision(path: Path) -> None:
    """It has no build without CUDA on every index, so nothing may need it."""
    assert not [name for name in _imports(_tree(path)) if name.split(".")[0] == "torchvision"]


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    first = function.body[0]
    described = ast.get_docstring(function) is not None and len(function.body) > 1
    start = function.body[1].lineno if described else first.lineno
    return function.end_lineno - start + 1


@pytest.mark.parametrize("path", ALL, ids=_name)
def test_a_file_and_its_functions_are_short_enough_to_read(path: Path) -> None:
    limit = MAX_TEST_FILE if REPO / "tests" in path.parents else MAX_FILE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    long = {
        node.name: _code_lines(node)
        for node in ast.walk(_tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and _code_lines(node) > MAX_FUNCTION
    }
    assert long == {}


def _tracked() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=REPO, capture_output=True, check=True)
    paths = [REPO / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_of_one_machine() -> None:
    """Home folders, the folder that this checkout happens to lie in, addresses of inner hosts."""
    places = [r"/(?:home|root|Users)/[\w.]+/"]
    examples = Path("/data"), Path("/tmp"), Path("/")
    if REPO.parent not in (*examples, Path(tempfile.gettempdir())):
        places.append(rf"(?<![\w.~-]){re.escape(REPO.parent.as_posix())}/")
    places.append(r"(?<![\d.])(?:10\.\d+|192\.168)(?:\.\d+){2}(?![\d.])")
    inner = re.compile("|".join(places))
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 2_000_000 and path != Path(__file__):
            found += [f"{_name(path)}: {match}" for match in inner.findall(text)]
    assert found == []


def test_no_file_is_too_large_for_a_clone() -> None:
    large = {_name(p): p.stat().st_size for p in _tracked() if p.stat().st_size > 25 * 2**20}
    assert large == {}


def test_imports_point_one_way() -> None:
    """The contracts of ``setup.cfg``, where import-linter is installed (CI always has it)."""
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_torch_stays_out_of_what_needs_none() -> None:
    """Every torch-free module, imported in one process."""
    folders = ("console", "data/readers", "data/refshapes", "drawing", "export", "files")
    folders += ("masks", "metrics", "outputs", "settings")
    modules = ["types", "errors", "cli", "interrupts", "weights.folder"]
    modules += [f"commands.{module}" for module, _ in COMMANDS.values()]
    modules += [
        ".".join(path.relative_to(REPO / "risam_cli").with_suffix("").parts).removesuffix(
            ".__init__"
        )
        for folder in folders
        for path in (REPO / "risam_cli" / folder).rglob("*.py")
    ]
    script = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module('risam_cli.{name}')" for name in modules
    )
    script += "\nprint(sorted({'torch', 'transformers', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
