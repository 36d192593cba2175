"""The verb `decode_index`: what the codes of a dense index stand for, as vectors.

A query encoder learns against them (`students.query_tower`): an index and a student meet in these alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import UsageError
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.faiss_build import BATCH
from retrieval_kd.indexes.faiss_index import FaissIndex
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.indexes.faiss_recipe import FaissRecipe
from retrieval_kd.indexes.inputs import recorded
from retrieval_kd.indexes.segments import Segments
from retrieval_kd.plan import Plan
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.vectors import Vectors


def decode_index(index: str | Path | Index, out: str | Path, *, force: bool = False) -> Vectors:
    """The vectors artifact of what ``index`` has of each document: its scores are inner products of queries with them.

    They are of the model and the collection of the index, and compared as they are (``dot``), also where the index
    compares queries by cosine. Raises `UsageError` for an index that is not of FAISS, whose scores are no inner
    products with decoded vectors, or from which documents were deleted.
    """
    from retrieval_kd.data.vector_writer import layout_details, write_ids
    from retrieval_kd.data.vectors import Vectors

    opened = Index.load(index) if isinstance(index, str | Path) else index
    pieces = [_checked(piece) for piece in (opened.segments if isinstance(opened, Segments) else [opened])]
    if opened.live is not None:
        raise UsageError(f"{opened.path}: has deleted documents; first: retrieval-kd update INDEX compact")
    recipe = {"kind": "decode", "of": "documents", "split": None}
    inputs = {name: recorded(opened, name) for name in ("model", "collection")}
    plan = Plan("vectors", recipe, {**inputs, "index": opened.ref()})
    if plan.finished(Path(out), force=force):
        return Vectors.load(out)
    dimension = pieces[0].dimension
    with plan.write(Path(out), force=force) as draft:
        shape = (len(opened), dimension)
        matrix = np.lib.format.open_memmap(draft.path / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
        row = 0
        with progress(f"decoding {len(opened):,} documents", len(opened)) as advance:
            for piece in pieces:
                decode = _decoder(piece)
                for start in range(0, len(piece), BATCH):
                    found = decode(np.arange(start, min(start + BATCH, len(piece))))
                    matrix[row : row + len(found)] = found
                    row += len(found)
                    advance(len(found))
        matrix.flush()
        write_ids(draft.path / "ids.arrow", opened.ids)
        draft.counts["vectors"] = len(opened)
        draft.details.update({**recipe, "similarity": "dot", **layout_details(draft.path, "dense", dimension)})
    return Vectors.load(out)


def _checked(piece: Index) -> FaissIndex:
    """``piece``; `UsageError` unless its scores are inner products with what it can decode."""
    if not isinstance(piece, FaissIndex):
        raise UsageError(f"{piece.path}: only dense indexes of FAISS are decoded (kind faiss or distill-vq)")
    faiss = import_faiss()
    assert isinstance(piece.recipe, FaissRecipe)
    if piece.recipe.rerank is not None:
        raise UsageError(f"{piece.path}: re-ranks by stored vectors: its scores are not those of its codes")
    inside = list(structure.parts(piece.native))
    rounded = any(type(part).__name__.endswith("RaBitQ") or isinstance(part, faiss.IndexRefine) for part in inside)
    if rounded or any(step.have_bias for part in inside for step in _steps(part)):
        raise UsageError(
            f"{piece.path}: the scores of factory '{piece.recipe.factory}' are no inner products with decoded vectors"
        )
    return piece


def _steps(part: Any) -> list[Any]:
    """The linear maps before an index."""
    faiss = import_faiss()
    if not isinstance(part, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(part.chain.at(step)) for step in range(part.chain.size())]


def _decoder(piece: FaissIndex) -> Any:
    """A function from rows [n] to their vectors [n, d] in the space of queries.

    Where queries are mapped by A first, the score of a decoded x is (Aq)ᵀx = qᵀ(Aᵀx), whatever A is.
    """
    faiss = import_faiss()
    native = piece.native
    inner = structure.searched_part(native)
    structure.prepare_decoding(native)
    maps = [
        faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in)
        for part in structure.parts(native)
        for step in _steps(part)
    ]

    def decode(rows: np.ndarray) -> np.ndarray:
        found = inner.reconstruct_batch(rows)
        for matrix in reversed(maps):
            found = found @ matrix
        return np.asarray(found, dtype=np.float32)

    return decode
