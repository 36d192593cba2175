"""The verb `encode`: a model's vectors of a collection's documents or of a split's queries, resumable."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.artifact import Plan, write_atomically
from retrieval_kd.errors import RetrievalKDError
from retrieval_kd.models.encoder import DenseEncoder, Truncation
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

CHUNK = 2048
"""Texts between two points from which an interrupted run goes on; batches never cross a chunk."""


def encode(
    model: str | Path,
    collection: str | Path | Collection,
    out: str | Path,
    *,
    queries: str | None = None,
    force: bool = False,
) -> Vectors:
    """The vectors artifact of ``collection``'s documents, or of the queries of split ``queries``.

    ``model`` is ``builtin``, a model artifact, a sentence-transformers directory or a hub id.
    """
    from retrieval_kd.data.sources import open_collection
    from retrieval_kd.data.vectors import Vectors, write_ids

    out = Path(out)
    opened = open_collection(collection)
    encoder = DenseEncoder.load(model)
    recipe = {"kind": "encode", "of": "queries" if queries else "documents", "split": queries}
    plan = Plan("vectors", recipe, {"model": encoder.ref(), "collection": opened.ref()})
    if plan.finished(out, force=force):
        return Vectors.load(out)
    if queries:
        by_id = opened.queries(queries)
        ids, texts = list(by_id), list(by_id.values())
    else:
        ids, texts = None, None
    total = len(texts) if texts is not None else len(opened.documents)
    with plan.write(out, force=force, resumable=True) as draft:
        matrix = draft.path / "vectors.npy"
        speed = encode_resumably(
            matrix,
            total,
            (lambda start, stop: texts[start:stop])
            if texts is not None
            else (lambda start, stop: list(opened.documents.iter_texts(start, stop))),
            encoder.encode_queries if queries else encoder.encode_documents,
            encoder.dimension,
            encoder.truncation,
            what=f"encoding {total:,} {'queries' if queries else 'documents'}",
        )
        write_ids(draft.path / "ids.arrow", ids if ids is not None else opened.documents.ids)
        draft.counts["vectors"] = total
        draft.details.update(
            {
                **recipe,
                "similarity": encoder.similarity,
                "dimension": encoder.dimension,
                "texts_per_second": speed,
                **encoder.truncation.to_json(),
            }
        )
    if encoder.truncation.texts:
        log.warning(
            "%s of %s texts were cut at the model's length, %s tokens lost",
            f"{encoder.truncation.texts:,}",
            f"{total:,}",
            f"{encoder.truncation.tokens:,}",
        )
    return Vectors.load(out)


def estimate_encode(
    model: str | Path, collection: str | Path | Collection, *, queries: str | None = None
) -> dict[str, Any]:
    """What `encode` would write: texts, dimension, bytes a vector and in all."""
    from retrieval_kd.data.sources import open_collection

    opened = open_collection(collection)
    encoder = DenseEncoder.load(model)
    total = len(opened.queries(queries)) if queries else len(opened.documents)
    return {
        "texts": total,
        "dimension": encoder.dimension,
        "bytes_per_vector": 4 * encoder.dimension,
        "bytes": 4 * encoder.dimension * total,
        "similarity": encoder.similarity,
    }


def encode_resumably(
    path: Path,
    total: int,
    texts: Callable[[int, int], Sequence[str]],
    encode_texts: Callable[[Sequence[str]], np.ndarray],
    dimension: int,
    truncation: Truncation,
    *,
    what: str,
) -> float | None:
    """Fills ``path`` (.npy, float32 [total, dimension]) chunk by chunk and says how many texts a second it encoded.

    A progress file beside ``path`` is replaced after each chunk reached the disk, so that a killed run goes on there.
    """
    if total == 0:
        raise RetrievalKDError("there are no texts to encode")
    state_file = path.with_suffix(".progress")
    state = {"done": 0, "truncated_texts": 0, "tokens_lost": 0, "seconds": 0.0}
    if state_file.is_file() and path.is_file():
        state = json.loads(state_file.read_text())
        matrix = np.lib.format.open_memmap(path, mode="r+")
        log.info("going on after %s of %s texts", f"{state['done']:,}", f"{total:,}")
    else:
        matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(total, dimension))
    truncation.texts += int(state["truncated_texts"])
    truncation.tokens += int(state["tokens_lost"])
    with progress(what, total, done=int(state["done"])) as advance:
        for start in range(int(state["done"]), total, CHUNK):
            stop = min(start + CHUNK, total)
            chunk = texts(start, stop)
            began = time.perf_counter()
            matrix[start:stop] = encode_texts(chunk)
            state["seconds"] += time.perf_counter() - began
            matrix.flush()
            state |= {"done": stop, **truncation.to_json()}
            write_atomically(state_file, json.dumps(state).encode())
            advance(stop - start)
    del matrix
    state_file.unlink()
    return round(total / state["seconds"], 2) if state["seconds"] > 0 else None
