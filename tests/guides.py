"""Pages of the documentation, whose examples run as tests."""

import pathlib
import re
import shlex

import matplotlib.pyplot
from typer.testing import CliRunner

import editing.cli
import mediation.cli

ROOT = pathlib.Path(__file__).parents[1]
_PROGRAMS = {"mediation": mediation.cli.app, "editing": editing.cli.app}


def run_python(page: str) -> dict[str, object]:
    """Runs the page's Python, block after block, and returns what it named."""
    names = {}
    for number, source in enumerate(_blocks(page, "python")):
        exec(compile(source, f"{page}, block {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    return names


def run_commands(page: str) -> list[list[str]]:
    """Runs the page's commands, one after the other, and returns them; each must end well."""
    commands = [shlex.split(line) for line in "".join(_blocks(page, "sh")).splitlines()]
    for program, *arguments in commands:
        result = CliRunner().invoke(_PROGRAMS[program], arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    return commands


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
