"""What the documents say is what the program does."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from risam_cli.version import __version__

FLAG = r"(?<![\w-])--?[a-z][\w-]*"
QUOTED = r"'[^']*'|\"[^\"]*\""


def _generated(repo: Path) -> str:
    spec = importlib.util.spec_from_file_location("generate_cli", repo / "docs/generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.generate())


def test_the_command_reference_is_that_of_the_commands(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    written = (repo / "docs/cli.md").read_text(encoding="utf-8")
    assert written == _generated(repo), "run: python docs/generate_cli.py"


def _documents(repo: Path) -> list[Path]:
    return [*repo.glob("*.md"), *repo.glob("docs/**/*.md")]


def test_links_between_documents_lead_somewhere(repo: Path) -> None:
    broken = []
    for document in _documents(repo):
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.split("#")[0]
            if path and "://" not in target and not (document.parent / path).exists():
                broken.append(f"{document.relative_to(repo)}: {target}")
    assert broken == []


def test_documents_name_no_option_that_does_not_exist(repo: Path) -> None:
    """Every ``risam …`` line in a code fence uses options of that command."""
    reference = (repo / "docs/cli.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r"^#+ risam ?([\w -]*)\n\n```text\n(.*?)\n```", reference, re.M | re.S)
    )
    wrong = []
    for document in _documents(repo):
        fences = re.findall(r"```\w*\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
        calls = [
            call
            for line in "\n".join(fences).replace("\\\n", " ").splitlines()
            for call in re.split(r"&&|\||;", re.sub(r"\s#.*", "", re.sub(QUOTED, "x", line)))
            if document.name != "cli.md"
        ]
        for call in calls:
            found = re.match(r"\s*(?:\S*/)?risam((?: [a-z][a-z-]*)*)(.*)", call)
            if not found:
                continue
            words = found[1].split()
            while " ".join(words) not in sections:
                words.pop()
            known = set(re.findall(FLAG, sections[" ".join(words)]))
            used = set(re.findall(FLAG, found[2]))
            wrong += [f"{document.name}: {call.strip()}: {flag}" for flag in used - known]
    assert wrong == []


def test_the_readme_holds_the_one_test_command(repo: Path) -> None:
    """``.ci/run`` takes it from there, so there is one and it is one line."""
    text = (repo / "README.md").read_text(encoding="utf-8")
    marked = re.findall(r"<!-- test-command -->\n```\w*\n(.*?)\n```", text, re.DOTALL)
    assert len(marked) == 1
    assert "\n" not in marked[0]
    assert "pytest" in marked[0]


def test_the_change_log_has_this_version(repo: Path) -> None:
    text = (repo / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}\b", text, re.MULTILINE)


def test_ci_is_runnable(repo: Path) -> None:
    assert os.access(repo / ".ci/run", os.X_OK)


def test_every_import_is_a_dependency_and_every_dependency_is_imported(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[<>=\[; ]", entry)[0] for entry in project["dependencies"]}
    modules = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
    declared = {modules.get(name, name) for name in named}
    imported = set()
    for file in (repo / "risam_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module.split(".")[0])
    foreign = imported - sys.stdlib_module_names - {"risam_cli"}
    assert foreign - declared == set(), "imported, but no dependency"
    assert declared - foreign - INDIRECT == set(), "a dependency, but never imported"


# What is used without an import statement of its own.
INDIRECT = {
    "tensorboard",  # by torch.utils.tensorboard
    "segment-anything",  # by the place of its files, see model/rivals/sam.py
}
