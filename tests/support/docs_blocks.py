"""The code blocks of the documents: where they are, what their tags say, what they call.

A tag is an HTML comment right before the fence, invisible on the page and visible in its source::

    <!-- not run: needs RefCOCO -->      its options are checked, nothing is started
    <!-- needs: jq -->                   run where the tool is there
    <!-- with: SLURM_ARRAY_TASK_ID=0 --> run with these variables
    <!-- exits: 3 -->                    what the block's last command gives
    <!-- slow: starts two processes -->  run with the slow tests only
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

RUN = {"sh", "python"}
READ = {"json", "yaml"}
SHOWN = {"text", "mermaid"}  # nothing to run or to check
TAGS = {"not run", "needs", "with", "exits", "slow", "test-command"}

_FENCE = re.compile(r"((?:^<!--[^\n]*-->\n)*)^```(\w*)\n(.*?)^```$", re.M | re.S)
_TAG = re.compile(r"<!-- ([a-z -]+?)(?:: (.*?))? -->")
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?([^\n]*)\n(.*?)\n\1\n", re.S)


@dataclass(frozen=True)
class Block:
    """One fence of a document."""

    document: str
    line: int
    language: str
    text: str
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def documents(repo: Path) -> list[Path]:
    """All pages but the generated ones."""
    pages = [*repo.glob("*.md"), *repo.glob("docs/*.md"), repo / "sample_data/README.md"]
    return sorted(page for page in pages if page.name not in {"cli.md", "CHANGELOG.md"})


def blocks(repo: Path, document: Path) -> list[Block]:
    """The fences of a page, in order."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        tags = {name: value or "" for name, value in _TAG.findall(match[1])}
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(str(document.relative_to(repo)), line, match[2], match[3], tags))
    return found


def calls(script: str) -> Iterator[list[str]]:
    """The arguments of every ``risam`` in a shell script, those in here-documents too."""
    for _, _, body in _HEREDOC.findall(script):
        if body.startswith("#!"):
            yield from calls(body + "\n")
    script = _HEREDOC.sub(lambda found: f"<<X{found[2]}\n", script).replace("\\\n", " ")
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words = list(lexer)
        for start, word in enumerate(words):
            # The name in a longer path, such as .venv/bin/risam, but no file that ends so.
            if word != "risam" and not word.endswith("bin/risam"):
                continue
            call = []
            for after in words[start + 1 :]:
                if re.fullmatch(r"[();<>|&]+", after) or after == ":::":
                    break
                call.append(after)
            yield call


def wrong_usage(root: click.Group, call: list[str]) -> str | None:
    """What is wrong with the options of a call, without running it; None where it is right."""
    command: click.Command = root
    context = click.Context(root, info_name="risam")
    rest = list(call)
    while isinstance(command, click.Group):
        if not rest or rest[0].startswith("-"):
            return None  # risam --help and the like
        child = command.get_command(context, rest[0])
        if child is None:
            return f"no command {rest[0]!r}"
        context = click.Context(child, info_name=rest.pop(0), parent=context)
        command = child
    try:
        options, _, _ = command.make_parser(context).parse_args(args=rest)
    except click.UsageError as error:
        return error.format_message()
    for param in command.get_params(context):
        values = options.get(param.name or "")
        given = isinstance(values, (bool, str)) or (isinstance(values, (list, tuple)) and values)
        if not given and param.required and "--help" not in call:
            return f"{param.opts[0]} is missing"
        if isinstance(param.type, click.Choice):
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, str) and "$" not in value and value not in param.type.choices:
                    return f"{param.opts[0]} {value}: choose from {', '.join(param.type.choices)}"
    return None
