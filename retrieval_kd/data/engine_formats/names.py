"""Names that an engine can hold, for attribute columns and for tokens; no two become the same."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from retrieval_kd.data.vectors import Vectors

TOKENS = "tokens.json"
"""The file with the tokens whose name in the engine is another."""

_STEP = 1_048_576
"""Terms that are read at a time."""
LONGEST_TOKEN = 255
"""Characters: Lucene's white-space tokenizer divides a longer one."""


def field_names(columns: Sequence[str], reserved: Sequence[str]) -> dict[str, str]:
    """Column → field: letters, digits and ``_`` with a letter in front, and none of the ``reserved`` names.

    Other characters become ``_``; a name that is taken gets ``_`` at its end. A name that is fine stays.
    """
    fitting = [name for name in columns if _field(name) == name and name not in reserved]
    taken = {*reserved, *fitting}
    return {name: name if name in fitting else _unique(_field(name), taken) for name in columns}


def token_names(tokens: Sequence[str | None], unfit: str, instead: str) -> list[str]:
    """The name of each token: itself, with ``instead`` for what matches the pattern ``unfit``.

    ``[term-N]`` stands for term N when it has no token, an empty one or one longer than 255 characters. A name that is
    taken gets ``_`` at its end, and tokens that fit as they are have the first claim on their name.
    """
    pattern = re.compile(unfit)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for term, token in enumerate(tokens):
        if token and len(token) <= LONGEST_TOKEN and not pattern.search(token) and token not in taken:
            names[term] = token
            taken.add(token)
    for term, token in enumerate(tokens):
        if term not in names:
            name = pattern.sub(instead, token) if token and len(token) <= LONGEST_TOKEN else f"[term-{term}]"
            names[term] = _unique(name, taken)
    return [names[term] for term in range(len(tokens))]


class TokenNames:
    """The names by which an engine knows the tokens of sparse vectors; ``unfit`` and ``instead`` as `token_names`."""

    def __init__(self, vectors: Vectors, unfit: str, instead: str) -> None:
        self._vectors = vectors
        self.names = token_names(vectors.vocabulary, unfit, instead)

    @cached_property
    def json(self) -> Any:
        """The names as JSON: Arrow strings, one a term."""
        import pyarrow as pa

        return pa.array([json.dumps(name, ensure_ascii=False) for name in self.names], pa.string())

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Token → its name, where that is another; a term without a token is there if a vector has it."""
        used = self._used()
        pairs = enumerate(zip(self._vectors.vocabulary, self.names, strict=True))
        return {
            f"term {term}" if token is None else token: name
            for term, (token, name) in pairs
            if token != name and (token is not None or used[term])
        }

    def _used(self) -> np.ndarray:
        """Whether any vector has each term."""
        terms = self._vectors.sparse.terms
        used = np.zeros(len(self.names), dtype=bool)
        for start in range(0, len(terms), _STEP):
            used[terms[start : start + _STEP]] = True
        return used


def _field(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return plain if plain[:1].isalpha() else f"field_{plain.lstrip('_')}"


def _unique(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
