"""Writes vectors: those that were made elsewhere, and the parts that every writer of vectors shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.vectors import VOCABULARY, Vectors
from retrieval_kd.errors import UsageError
from retrieval_kd.plan import Plan


def write_vectors(
    out: str | Path,
    values: Any,
    ids: Sequence[str],
    *,
    of: str,
    split: str | None,
    similarity: str,
    model: InputRef,
    collection: InputRef,
    vocabulary: Sequence[str | None] | None = None,
    force: bool = False,
) -> Vectors:
    """The vectors artifact of vectors that were made elsewhere.

    ``values`` is a matrix [n, d]; or a sparse matrix of scipy [n, terms], with its ``vocabulary``; or a list of n
    matrices [tokens, d].
    """
    import scipy.sparse

    out = Path(out)
    if scipy.sparse.issparse(values):
        layout, dimension = "sparse", int(values.shape[1])
        if vocabulary is None or len(vocabulary) != dimension:
            raise UsageError(f"sparse vectors of {dimension} terms need a vocabulary of as many tokens")
    elif isinstance(values, list):
        layout, dimension = "multi-vector", int(values[0].shape[1])
    else:
        layout, dimension = "dense", int(values.shape[1])
    number = len(values) if isinstance(values, list) else int(values.shape[0])
    if number != len(ids):
        raise UsageError(f"{number} vectors but {len(ids)} ids")
    recipe: dict[str, Any] = {"kind": "import", "of": of, "split": split}
    plan = Plan("vectors", recipe, {"model": model, "collection": collection})
    if plan.finished(out, force=force):
        return Vectors.load(out)
    with plan.write(out, force=force) as draft:
        if layout == "sparse":
            csr = scipy.sparse.csr_array(values, dtype=np.float32)
            csr.eliminate_zeros()
            csr.sort_indices()
            arrays = {"indptr.npy": csr.indptr.astype(np.int64), "terms.npy": csr.indices.astype(np.int32)}
            arrays["weights.npy"] = csr.data
            write_vocabulary(draft.path, cast(Sequence[str | None], vocabulary))
        elif layout == "multi-vector":
            offsets = np.cumsum([0, *(len(matrix) for matrix in values)], dtype=np.int64)
            arrays = {"offsets.npy": offsets, "tokens.npy": np.concatenate(values).astype(np.float32)}
        else:
            arrays = {"vectors.npy": np.ascontiguousarray(values, dtype=np.float32)}
        for name, array in arrays.items():
            np.save(draft.path / name, array)
        write_ids(draft.path / "ids.arrow", ids)
        draft.counts["vectors"] = len(ids)
        draft.details.update({**recipe, "similarity": similarity})
        draft.details.update(layout_details(draft.path, layout, dimension))
    return Vectors.load(out)


def layout_details(folder: Path, layout: str, dimension: int) -> dict[str, Any]:
    """What a manifest says of the arrays in ``folder``: layout, dimension, bytes a vector, and how long vectors are."""
    details: dict[str, Any] = {"layout": layout, "dimension": dimension}
    if layout == "dense":
        return {**details, "bytes_per_vector": 4 * dimension}
    name, what = ("indptr.npy", "nonzeros") if layout == "sparse" else ("offsets.npy", "tokens")
    lengths = np.diff(np.load(folder / name))
    mean = float(lengths.mean()) if len(lengths) else 0.0
    each = 8
    if layout == "multi-vector":
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        details["dtype"] = tokens.dtype.name
        each = tokens.dtype.itemsize * dimension
    return {
        **details,
        f"mean_{what}": round(mean, 2),
        "empty_vectors": int(np.count_nonzero(lengths == 0)),
        "bytes_per_vector": round(each * mean + 8, 1),
    }


def write_vocabulary(folder: Path, tokens: Sequence[str | None]) -> None:
    """Writes ``vocabulary.json``: the token of each term, null where a term is no token."""
    (folder / VOCABULARY).write_text(json.dumps(list(tokens), ensure_ascii=False), encoding="utf-8")


def write_ids(path: Path, ids: Any) -> None:
    """Writes ids (strings, or an Arrow array of them) as an Arrow file with the one column ``id``."""
    import pyarrow as pa

    chunks = (
        ids.chunks
        if isinstance(ids, pa.ChunkedArray)
        else [ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())]
    )
    schema = pa.schema([("id", pa.string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in chunks:
            writer.write_batch(pa.record_batch([chunk.cast(pa.string())], schema=schema))
