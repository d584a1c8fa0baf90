"""The `mediation` command; other packages add commands through the entry-point group "mediation.commands"."""

import importlib.metadata

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Find where a concept lives in a text-to-image model, and change it."""


for _command in importlib.metadata.entry_points(group="mediation.commands"):
    app.command(_command.name)(_command.load())
