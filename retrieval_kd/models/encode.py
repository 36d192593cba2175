"""The verb `encode`: a model's vectors of a collection's documents or of a split's queries, resumable."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import InputError, RetrievalKDError, UsageError
from retrieval_kd.models.encoders import TextEncoder, open_encoder
from retrieval_kd.models.vectors_of_texts import Encoded, SparseVectors
from retrieval_kd.plan import Draft, Plan
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.growing import GrowingArrays
    from retrieval_kd.data.vectors import Vectors

log = logging.getLogger("retrieval_kd")

CHUNK = 1024
"""Texts between two points from which an interrupted run goes on; batches never cross a chunk."""
_SAMPLE = 64
"""Texts that an estimate encodes."""


class Texts:
    """The documents of a collection, or the queries of a split, by place."""

    def __init__(self, collection: Collection, queries: str | None) -> None:
        self.what = "queries" if queries else "documents"
        self.task = "query" if queries else "document"
        self._documents = collection.documents
        by_id = collection.queries(queries) if queries else None
        self._queries = None if by_id is None else list(by_id.values())
        self.ids: Any = self._documents.ids if by_id is None else list(by_id)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> list[str]:
        """The texts from ``start`` to ``stop``."""
        if self._queries is not None:
            return self._queries[start:stop]
        return list(self._documents.iter_texts(start, min(stop, len(self))))


def encode(
    model: str | Path | TextEncoder,
    collection: str | Path | Collection,
    out: str | Path,
    *,
    queries: str | None = None,
    half: bool = False,
    force: bool = False,
) -> Vectors:
    """The vectors artifact of ``collection``'s documents, or of the queries of split ``queries``.

    ``model`` is ``builtin``, a model artifact (an exported one too), a sentence-transformers directory or a hub id;
    what it is (dense, sparse, late-interaction) decides the layout. ``half`` keeps token vectors as float16, which
    only a late-interaction model has. Texts without any term or token are counted and said.
    """
    from retrieval_kd.data.growing import GrowingArrays
    from retrieval_kd.data.sources import open_collection
    from retrieval_kd.data.vector_writer import layout_details, write_ids, write_vocabulary
    from retrieval_kd.data.vectors import Vectors

    out = Path(out)
    opened = open_collection(collection)
    encoder = open_encoder(model) if isinstance(model, str | Path) else model
    if half and encoder.layout != "multi-vector":
        raise UsageError(f"half is for the token vectors of late-interaction models; these are {encoder.layout}")
    if encoder.queries_for and not queries:
        raise UsageError(
            f"model '{encoder.source.name}' is a query tower: it never learned documents, whose vectors are those of "
            "its teacher; give --queries SPLIT"
        )
    similarity = encoder.similarity  # one that no index knows is refused before hours of encoding
    recipe = {"kind": "encode", "of": "queries" if queries else "documents", "split": queries}
    plan = Plan(
        "vectors", recipe | ({"half": True} if half else {}), {"model": encoder.ref(), "collection": opened.ref()}
    )
    if plan.finished(out, force=force):
        return Vectors.load(out)
    texts = Texts(opened, queries)
    with plan.write(out, force=force, resumable=True) as draft:
        if encoder.layout == "sparse":
            write_vocabulary(draft.path, encoder.vocabulary)
        arrays = GrowingArrays(draft.path, draft.work / "encoded.json", {"done": 0, "seconds": 0.0, "dimension": 0})
        encode_resumably(arrays, texts, encoder, half=half)
        write_ids(draft.path / "ids.arrow", texts.ids)
        draft.counts["vectors"] = len(texts)
        if queries and (others := encoder.stands_for - {encoder.ref().fingerprint}):
            draft.details["stands_for"] = sorted(others)
        dimension = len(encoder.vocabulary) if encoder.layout == "sparse" else int(arrays.state["dimension"])
        seconds = float(arrays.state["seconds"])
        draft.details.update(
            {
                **recipe,
                "similarity": similarity,
                **layout_details(draft.path, encoder.layout, dimension),
                "texts_per_second": round(len(texts) / seconds, 2) if seconds > 0 else None,
                **encoder.truncation.to_json(),
            }
        )
        _warn(draft, len(texts))
    return Vectors.load(out)


def estimate_encode(
    model: str | Path | TextEncoder,
    collection: str | Path | Collection,
    *,
    queries: str | None = None,
    half: bool = False,
) -> dict[str, Any]:
    """What `encode` would write: texts, layout, dimension, bytes a vector and in all.

    The entries of a sparse or multi-vector text (``entries_per_vector``) are the mean of the first 64 texts.
    """
    from retrieval_kd.data.sources import open_collection

    encoder = open_encoder(model) if isinstance(model, str | Path) else model
    texts = Texts(open_collection(collection), queries)
    if not len(texts):
        raise InputError(f"there are no {texts.what} to encode")
    found = encoder.encode(texts.part(0, 1 if encoder.layout == "dense" else _SAMPLE), texts.task)
    if isinstance(found, Encoded):
        dimension, entries, each = found.vectors.shape[1], 1.0, 4.0 * found.vectors.shape[1]
    else:
        sparse, entries = isinstance(found, SparseVectors), float(found.lengths.mean())
        dimension = len(encoder.vocabulary) if isinstance(found, SparseVectors) else found.tokens.shape[1]
        each = 8 + entries * (8 if sparse else (2 if half else 4) * dimension)
    return {
        "texts": len(texts),
        "layout": encoder.layout,
        "dimension": dimension,
        "entries_per_vector": round(entries, 1),
        "bytes_per_vector": round(each, 1),
        "bytes": round(each * len(texts)),
        "similarity": encoder.similarity,
    }


def encode_resumably(arrays: GrowingArrays, texts: Texts, encoder: TextEncoder, *, half: bool = False) -> None:
    """Fills ``arrays`` with the vectors of all texts, chunk by chunk; a killed run goes on after the last chunk.

    The state keeps the texts done, the seconds they took, the length of a vector and what truncation lost.
    """
    total, state, truncation = len(texts), arrays.state, encoder.truncation
    if total == 0:
        raise RetrievalKDError(f"there are no {texts.what} to encode")
    if state["done"]:
        log.info("going on after %s of %s texts", f"{state['done']:,}", f"{total:,}")
    truncation.texts, truncation.tokens = int(state.get("truncated_texts", 0)), int(state.get("tokens_lost", 0))
    with progress(f"encoding {total:,} {texts.what}", total, done=int(state["done"])) as advance:
        for start in range(int(state["done"]), total, CHUNK):
            chunk = texts.part(start, min(start + CHUNK, total))
            began = time.perf_counter()
            found = encoder.encode(chunk, texts.task)
            state["seconds"] += time.perf_counter() - began
            state["done"] = start + len(chunk)
            state.update(truncation.to_json())
            if isinstance(found, Encoded):
                state["dimension"] = found.vectors.shape[1]
                arrays.append({"vectors.npy": found.vectors})
            elif isinstance(found, SparseVectors):
                bounds = _bounds(found.lengths, arrays.rows("terms.npy"), first=start == 0)
                arrays.append({"indptr.npy": bounds, "terms.npy": found.terms, "weights.npy": found.weights})
            else:
                state["dimension"] = found.tokens.shape[1]
                bounds = _bounds(found.lengths, arrays.rows("tokens.npy"), first=start == 0)
                arrays.append({"offsets.npy": bounds, "tokens.npy": _halved(found.tokens) if half else found.tokens})
            advance(len(chunk))


def _bounds(lengths: np.ndarray, before: int, *, first: bool) -> np.ndarray:
    """Where each vector of a chunk ends among all entries; the first chunk's begin with 0."""
    ends = before + np.cumsum(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(1, dtype=np.int64), ends]) if first else ends


def _halved(tokens: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        small = tokens.astype(np.float16)
    if not np.isfinite(small).all():
        raise RetrievalKDError("token vectors have values above 65,504, which float16 cannot hold; encode without half")
    return small


def _warn(draft: Draft, total: int) -> None:
    details = draft.details
    if details["truncated_texts"]:
        log.warning(
            "%s of %s texts were cut at the model's length, %s tokens lost",
            f"{details['truncated_texts']:,}",
            f"{total:,}",
            f"{details['tokens_lost']:,}",
        )
    if details.get("empty_vectors"):
        log.warning(
            "%s of %s texts have no %s and match nothing",
            f"{details['empty_vectors']:,}",
            f"{total:,}",
            "term" if details["layout"] == "sparse" else "token",
        )
