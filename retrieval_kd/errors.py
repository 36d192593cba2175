"""The exception tree; every error carries the exit code of the command line.

::

    RetrievalKDError             1  the work itself failed
    ├── UsageError               2  arguments that cannot be right
    │   └── RecipeError          2  a recipe that cannot be right
    ├── MissingExtraError        3  a package that is not installed (names the pip line)
    └── InputError               4  missing or invalid input
        ├── DataError            4  a file whose content is wrong (names file and line)
        ├── ArtifactError        4  not an artifact, damaged, or made from something else
        └── OutputExistsError    4  the output is there already and is something else
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RetrievalKDError(Exception):
    """The root of every error this package raises on purpose."""

    exit_code = 1


class UsageError(RetrievalKDError):
    """Arguments that cannot be right."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be right: unknown key, wrong type, unknown kind."""


class MissingExtraError(RetrievalKDError):
    """A package that is not installed; the message ends in the pip line that installs it."""

    exit_code = 3

    def __init__(self, what: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{what}; install it with: pip install 'retrieval-kd[{extra}]'")


class InputError(RetrievalKDError):
    """Missing or invalid input."""

    exit_code = 4


class DataError(InputError):
    """A file whose content is wrong, with its place."""


class ArtifactError(InputError):
    """Not an artifact, a damaged one, or one made from something else."""


class OutputExistsError(InputError):
    """The output exists and is not what this command would write."""


def did_you_mean(wrong: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest valid name, else the list of valid names."""
    names = sorted(valid)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (valid: {', '.join(names)})"


def first(values: Iterable[object], n: int = 3) -> str:
    """The first ``n`` values as text, for messages that name examples: ``'a', 'b', 'c', …``."""
    items = list(values)
    text = ", ".join(repr(v) for v in items[:n])
    return text + (", …" if len(items) > n else "")
