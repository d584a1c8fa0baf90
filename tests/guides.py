"""Pages of the documentation, whose examples run as tests."""

import contextlib
import functools
import pathlib
import re
import shlex
from unittest import mock

import matplotlib.pyplot
import pytest
from typer.testing import CliRunner

import editing
import editing.cli
import mediation.cli
from mediation import bundled

ROOT = pathlib.Path(__file__).parents[1]
_PROGRAMS = {"mediation": mediation.cli.app, "editing": editing.cli.app}


def run_python(page: str, smaller: dict[str, str] | None = None) -> dict[str, object]:
    """Runs the page's Python, block after block, and returns what it named.

    Args:
        page: relative to the repository.
        smaller: texts of the page, each in it once, and what to run in their place, such as {"steps=25": "steps=1"}.
    """
    names = {}
    for number, source in enumerate(_made_smaller(_blocks(page, "python"), smaller)):
        exec(compile(source, f"{page}, block {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    return names


def run_commands(page: str, smaller: dict[str, str] | None = None) -> list[list[str]]:
    """Runs the page's commands, one after the other, and returns them; each must end well. Models are loaded once."""
    blocks = _made_smaller(_blocks(page, "sh"), smaller)
    commands = [shlex.split(line) for line in "".join(blocks).splitlines()]
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


def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the suite that is made of pairs, one prompt for each role."""
    emoji_suite = editing.emoji_suite

    def one_of_each(pairs, **options):
        return editing.Suite({trial.role: trial for trial in emoji_suite(pairs, **options)}.values())

    monkeypatch.setattr(editing, "emoji_suite", one_of_each)


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def _made_smaller(blocks: list[str], smaller: dict[str, str] | None) -> list[str]:
    whole = "".join(blocks)
    for text, less in (smaller or {}).items():
        assert whole.count(text) == 1, f"expected {text!r} once, found it {whole.count(text)} times"
        blocks = [block.replace(text, less) for block in blocks]
    return blocks
