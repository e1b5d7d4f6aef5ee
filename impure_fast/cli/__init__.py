"""The command line: ``impure-fast COMMAND``, a module for each group of commands.

torch, numpy and Pillow are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

MISSING = 'impure-fast needs the extra "cli": pip install "impure-fast[cli]".'


def make_app() -> typer.Typer:
    """The typer application."""
    import typer

    from . import attack, evaluate, files, purify, serve, show, train
    from .common import plain_ending

    app = typer.Typer(
        name="impure-fast",
        help="Adversarial purification by information masking (IMPure).",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (
        *(purify.purify, serve.serve, show.demo, show.app, show.info, show.models),
        *(files.data, files.convert, files.export),
        *(attack.attack, train.train, train.finetune, evaluate.evaluate),
    ):
        app.command()(plain_ending()(command))
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``impure-fast``.  Ends by SystemExit with the exit code."""
    try:
        import rich  # noqa: F401 (typer's help and every table need it)
        import typer  # noqa: F401
    except ImportError:
        raise SystemExit(MISSING) from None
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata; what it refuses becomes a sentence
    make_app()(arguments, prog_name="impure-fast")
