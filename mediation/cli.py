"""The `mediation` command; other packages add commands through the entry-point group "mediation.commands"."""

import importlib.metadata

import diffusers
import transformers
import typer

# What libraries say while they load is not for the command line.
transformers.logging.set_verbosity_error()
for _library in (diffusers, transformers):
    _library.utils.logging.disable_progress_bar()

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Find where a concept lives in a text-to-image model, and change it."""


for _command in importlib.metadata.entry_points(group="mediation.commands"):
    app.command(_command.name)(_command.load())
