"""Pages of the documentation, whose examples run as tests."""

import contextlib
import functools
import pathlib
import re
import shlex
from unittest import mock

import matplotlib.pyplot
from typer.testing import CliRunner

import editing.cli
import mediation.cli
from mediation import bundled

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
    """Runs the page's commands, one after the other, and returns them; each must end well. Models are loaded once."""
    commands = [shlex.split(line) for line in "".join(_blocks(page, "sh")).splitlines()]
    loaded_once = [
        mock.patch.object(module, name, functools.cache(getattr(module, name)))
        for module, name in ((mediation, "load_pipeline"), (bundled, "load_scorer"), (bundled, "load_probe"))
    ]
    with contextlib.ExitStack() as stack:
        for patch in loaded_once:
            stack.enter_context(patch)
        for program, *arguments in commands:
            result = CliRunner().invoke(_PROGRAMS[program], arguments)
            assert result.exit_code == 0, f"{arguments}: {result.output}"
    return commands


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
