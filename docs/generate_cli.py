"""Write ``docs/cli.md`` from the commands themselves: ``python docs/generate_cli.py``.

A test holds the file equal to what this prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from risam_cli.cli import root

TARGET = Path(__file__).with_name("cli.md")
WIDTH = 96

HEAD = """# Command line

Generated from the commands by `python docs/generate_cli.py`; a test keeps it so.

Data goes to stdout, messages and progress go to stderr. Every command exits with

| code | meaning |
|---|---|
| 0 | all done |
| 1 | could not start or could not go on; one line names the value, the place and the fix |
| 2 | wrong usage |
| 3 | the run finished, but some items failed; each is in `failures.jsonl` |
| 130 | interrupted; what was done is kept and can be resumed |
"""


def commands(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[str, click.Context]]:
    """Every command below ``command`` with its full name, itself first."""
    context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    context.max_content_width = context.terminal_width = WIDTH
    yield context.command_path, context
    if isinstance(command, click.Group):
        for child_name in command.list_commands(context):
            child = command.get_command(context, child_name)
            if child is not None and not child.hidden:
                yield from commands(child, child_name, context)


def generate() -> str:
    """The whole reference: a heading and the ``--help`` text of each command."""
    parts = [HEAD]
    for path, context in commands(root, "risam"):
        level = "#" * (path.count(" ") + 2)
        text = context.command.get_help(context)
        parts.append(f"{level} {path}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="utf-8")
    sys.stderr.write(f"wrote {TARGET.name}\n")
