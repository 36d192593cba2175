"""The IDF table of inference-free sparse retrieval: what a word-piece of a query weighs (Geng et al. 2024)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrieval_kd.errors import DataError, InputError, first

UNSEEN = 1.0
"""The weight of a word-piece that no document has."""
IDF_FILE = "idf.json"
_TEXTS_AT_ONCE = 1000


class IdfTable(NamedTuple):
    """``weights`` [V] float32 by token id; special tokens weigh 0 and are in neither count."""

    weights: np.ndarray
    known: int
    """Tokens with a weight of their own."""
    unseen: int
    """Tokens without a weight of their own: they have 1."""


def idf_of_texts(texts: Iterable[str], tokenizer: Any) -> IdfTable:
    """``ln(1 + (D - df + 0.5) / (df + 0.5))`` of every token over D texts, df by word-piece, texts read whole.

    Special tokens, the unknown word among them, weigh 0; tokens that no text has weigh 1.
    """
    df = np.zeros(len(tokenizer), dtype=np.int64)
    number = 0
    for some in _batches(texts):
        number += len(some)
        for ids in tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            df[np.unique(np.asarray(ids, dtype=np.int64))] += 1
    weights = np.log1p((number - df + 0.5) / (df + 0.5)).astype(np.float32)
    return _finished(weights, df > 0, tokenizer)


def read_idf(path: str | Path, tokenizer: Any) -> IdfTable:
    """The table in a JSON file of token → weight, as `write_idf` and OpenSearch's models have it.

    Special tokens weigh 0 whatever the file says; tokens that it lacks weigh 1. Raises `InputError` when it has tokens
    that the tokenizer lacks, `DataError` for a weight that is not a number of at least 0.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path}: not an object of token → weight")
    bad = [token for token, weight in table.items() if not _is_weight(weight)]
    if bad:
        raise DataError(f"{path}: {len(bad)} weights are no numbers of at least 0, of the tokens {first(bad)}")
    vocabulary = tokenizer.get_vocab()
    foreign = sorted(table.keys() - vocabulary.keys())
    if foreign:
        raise InputError(
            f"{path}: {len(foreign)} of its {len(table)} tokens are not among the {len(vocabulary)} of the base's "
            f"tokenizer ({first(foreign)}): it is the table of another vocabulary; leave idf away to make one"
        )
    weights = np.zeros(len(tokenizer), dtype=np.float32)
    known = np.zeros(len(tokenizer), dtype=bool)
    places = [vocabulary[token] for token in table]
    weights[places], known[places] = list(table.values()), True
    return _finished(weights, known, tokenizer)


def write_idf(path: Path, weights: np.ndarray, tokenizer: Any) -> None:
    """Writes token → weight, in the order of token ids."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    table = {token: round(float(weights[place]), 6) for token, place in by_id}
    path.write_text(json.dumps(table, ensure_ascii=False, indent=0), encoding="utf-8")


def _finished(weights: np.ndarray, known: np.ndarray, tokenizer: Any) -> IdfTable:
    special = np.zeros(len(weights), dtype=bool)
    special[[token for token in tokenizer.all_special_ids if token < len(weights)]] = True
    weights[~known] = UNSEEN
    weights[special] = 0.0
    return IdfTable(weights, int((known & ~special).sum()), int((~known & ~special).sum()))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while some := list(islice(remaining, _TEXTS_AT_ONCE)):
        yield some


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
