"""``risam completion``: the script that makes a shell complete what is typed."""

from __future__ import annotations

import click

from risam_cli.commands.options import choice, verbosity_options

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=choice(SHELLS), metavar="SHELL")
@verbosity_options
def command(shell: str) -> None:
    """Print the script that completes risam's commands and options in SHELL.

    SHELL is bash (4.4 or later), zsh or fish. Commands, options, choices, names of models and
    comma separated lists are completed; files where files are meant.

    \b
    Examples:
      risam completion bash >> ~/.bash_completion
      risam completion zsh > "${fpath[1]}/_risam"
      risam completion fish > ~/.config/fish/completions/risam.fish
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root()
    made = get_completion_class(shell)
    assert made is not None
    # Only the text of the script: source() of bash would first start a bash to ask its version.
    completer = made(root.command, {}, "risam", "_RISAM_COMPLETE")
    script = completer.source_template % completer.source_vars()
    # click's script for fish cuts a value at its first comma, and our lists have commas.
    click.echo(script.replace('(string split "," ', '(string split -m 1 "," '))
