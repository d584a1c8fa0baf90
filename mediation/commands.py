"""What command lines of this project share: quiet libraries, and messages in place of tracebacks."""

import functools
from collections.abc import Callable

import diffusers
import transformers
import typer

# What a user can get wrong, and what a pipeline says that cannot do what was asked.
_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError)


def new_app() -> typer.Typer:
    """An application without commands; what libraries say while they load is not for the command line."""
    transformers.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    return typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def add_command(app: typer.Typer, function: Callable) -> Callable:
    """Makes a command of a function; its user's mistakes become messages, not tracebacks."""

    @functools.wraps(function)
    def command(*arguments, **options):
        try:
            return function(*arguments, **options)
        except _ERRORS as error:
            message = error.args[0] if isinstance(error, KeyError) else error
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from error

    return app.command(function.__name__.replace("_", "-"))(command)
