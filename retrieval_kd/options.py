"""The options and arguments that several verbs share, so that each is named and explained in one way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_kd.errors import UsageError

log = logging.getLogger("retrieval_kd")


def _log_level(verbose: bool | None) -> bool | None:
    log.setLevel({True: logging.DEBUG, False: logging.WARNING, None: logging.INFO}[verbose])
    return verbose


_COLLECTION = typer.Option("--collection", metavar="C", help="A collection artifact, a BEIR folder, irds:ID or pydocs.")
MODEL_NAMES = "A model artifact, a sentence-transformers directory, a hub name or builtin"

IndexArtifact = Annotated[Path, typer.Argument(help="An index artifact.")]
Collection = Annotated[str, _COLLECTION]
MaybeCollection = Annotated[str | None, _COLLECTION]
MaybeModel = Annotated[str | None, typer.Option("--model", metavar="M", help=f"{MODEL_NAMES}.")]
Split = Annotated[str, typer.Option("--split", metavar="S", help="The split whose queries and qrels are used.")]
TeacherScores = Annotated[
    list[Path] | None,
    typer.Option("--scores", metavar="S", help="Teacher scores to learn from; may be given many times."),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the result goes.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; may be given many times."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace something else at --out; it stays until the new one is whole.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and its cost, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[
    bool | None,
    typer.Option("-v/-q", "--verbose/--quiet", callback=_log_level, show_default=False, help="More or fewer messages."),
]


def recipe_argument(what: str) -> Any:
    """The argument that names a recipe; ``what`` begins its help ("A teacher recipe")."""
    return typer.Argument(help=f"{what}: a file, or the name of a shipped one.")


def by_name_of(option: str, given: list[str] | None) -> dict[str, Path]:
    """Name → path of ``[NAME=]PATH`` arguments; a path alone is named by its last part.

    Raises `UsageError` for a name that is given twice.
    """
    named: dict[str, Path] = {}
    for text in given or ():
        name, separator, path = text.partition("=")
        if not separator or "/" in name:
            name, path = Path(text).resolve().name, text
        if not name or not path:
            raise UsageError(f"{option} {text}: write it as NAME=PATH or PATH")
        if name in named:
            raise UsageError(f"{option} {text}: the name '{name}' is taken by {named[name]}; write it as NAME=PATH")
        named[name] = Path(path)
    return named
