"""The verb `export`: a model as ONNX graphs that onnxruntime runs without torch, after a comparison with torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import RetrievalKDError, UsageError
from retrieval_kd.models.export_graphs import GraphWriter
from retrieval_kd.models.export_reference import TorchCrossEncoder, TorchEncoder, bare, open_reference
from retrieval_kd.models.exported import AnyExported, ExportedCrossEncoder, open_exported
from retrieval_kd.models.load import SETTINGS, Model, ModelSource, find_model
from retrieval_kd.models.onnx import require_onnx
from retrieval_kd.models.parity import (
    MEASURE,
    Task,
    Tolerance,
    compare_scores,
    compare_vectors,
    make_task,
    rank_pairs,
    search,
    tolerance_of,
)
from retrieval_kd.plan import Plan

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

COMPARED = 256
"""Queries, and documents, whose vectors are compared."""
_CHUNK = 64
"""Texts that are compared at a time."""
_SAMPLE = "Rankers teach small models to search: what the large one knows, the small one learns from its scores. "
_TEXTS = (
    "",
    "?",
    "search",
    "What does a student learn from its teacher?",
    "Über 3,000 naïve cafés (c. 1998) — see §4.2: «α ≤ β», 検索.",
    _SAMPLE,
    _SAMPLE * 4,
    _SAMPLE * 40,
)
"""What is compared where no collection is given; the last one is longer than most models read."""


def export_model(
    model: str | Path,
    *,
    format: str,
    out: str | Path,
    collection: str | Path | Collection | None = None,
    split: str | None = None,
    documents: int | None = None,
    tolerance: Tolerance | None = None,
    force: bool = False,
) -> Model:
    """The model artifact at ``out`` that runs without torch: ``format`` is ``onnx`` (float32) or ``onnx-int8``.

    Its vectors, or a cross-encoder's scores, are compared with torch's on the first 256 documents and queries of
    ``collection`` (on a few built-in texts without one), and with a ``split`` the nDCG@10 of an exact search too: in
    all documents, or in the relevant ones and others by chance, ``documents`` in all. Raises `RetrievalKDError`, and
    publishes nothing, when they differ by more than ``tolerance``.
    """
    from retrieval_kd.data.sources import open_collection

    tolerance = tolerance or tolerance_of(format)
    if collection is None and (split or documents):
        raise UsageError("a split, or a number of documents, needs a collection")
    if documents is not None and (split is None or documents < 1):
        raise UsageError(f"documents is how many of them a split's queries search in, 1 or more (got {documents})")
    require_onnx()
    out, source = Path(out), find_model(model)
    opened = None if collection is None else open_collection(collection)
    recipe = {
        "kind": "export",
        "format": format,
        "split": split,
        "documents": documents,
        "tolerance": asdict(tolerance),
    }
    inputs = {"model": source.ref()} | ({"collection": opened.ref()} if opened else {})
    plan = Plan("model", recipe, inputs)
    if plan.finished(out, force=force):
        return Model.load(out)
    reference = open_reference(source)
    task = make_task(opened, split, documents) if opened and split else None
    with plan.write(out, force=force) as draft:
        log.info("exporting %s", source.name)
        exported = _write(reference, source, format, draft.path)
        log.info("comparing it with torch")
        found = _compare(reference, exported, opened, task)
        shown = [name for name in ("difference", "cosine", "kendall_tau", "torch", "exported") if name in found]
        log.info("  %s", ", ".join(f"{name.replace('_', ' ')} {found[name]:.6g}" for name in shown))
        if problems := tolerance.broken(found):
            raise RetrievalKDError(
                f"{source.name} as {format} is too far from torch: {'; '.join(problems)}; nothing was written "
                f"(the tolerance can be set{', or use format onnx' if format != 'onnx' else ''})"
            )
        draft.counts["bytes"] = sum(file.stat().st_size for file in draft.path.iterdir() if file.is_file())
        draft.details.update({"format": format, "layout": exported.layout, "parity": found})
    return Model.load(out)


def _write(reference: TorchEncoder | TorchCrossEncoder, source: ModelSource, format: str, folder: Path) -> AnyExported:
    """Graphs, tables, tokenizers and settings in ``folder``, and the model that they are."""
    writer = GraphWriter(folder, f"model '{source.name}'", int8=format == "onnx-int8")
    settings: dict[str, Any] = {"kind": "export", "format": format, "layout": reference.layout}
    if isinstance(reference, TorchCrossEncoder):
        settings |= writer.cross_encoder(reference.model)
    else:
        settings |= {"similarity": reference.similarity, **writer.encoder(reference)}
    file = source.path / SETTINGS
    former = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings |= {name: former[name] for name in ("queries_for",) if name in former}
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False).encode())
    return open_exported(ModelSource(source.name, folder, source.fingerprint))


def _compare(
    reference: TorchEncoder | TorchCrossEncoder, exported: AnyExported, collection: Collection | None, task: Task | None
) -> dict[str, Any]:
    """The manifest's account of how far the two are from each other, and on what."""
    queries, documents = _texts(collection, task)
    found: dict[str, Any] = {"texts": "built-in" if collection is None else "of the collection"}
    found |= {"compared_queries": len(queries), "compared_documents": len(documents)}
    if isinstance(reference, TorchCrossEncoder):
        assert isinstance(exported, ExportedCrossEncoder)
        pairs = [queries[i % len(queries)] for i in range(len(documents))], documents
        found |= compare_scores(reference.scores(*pairs), exported.scores(*pairs)[0])
    else:
        assert not isinstance(exported, ExportedCrossEncoder)
        network = exported.bare()
        chunks = [(some, name) for name, texts in (("query", queries), ("document", documents)) for some in _cut(texts)]
        with bare(reference):
            by_torch = (reference.encode(some, name) for some, name in chunks)
            found |= compare_vectors(by_torch, (network.encode(some, name) for some, name in chunks))
    if task is not None:
        torch, other = (task.ndcg(_run(model, task, exported)) for model in (reference, exported))
        found |= {
            "measure": MEASURE,
            "split": task.split,
            "queries": len(task.queries),
            "documents": len(task.rows),
            "torch": torch,
            "exported": other,
            "ndcg_loss": torch - other,
        }
    return found


def _run(model: TorchEncoder | TorchCrossEncoder | AnyExported, task: Task, exported: AnyExported) -> Any:
    if isinstance(model, TorchCrossEncoder):
        return rank_pairs(task, model.scores)
    if isinstance(model, ExportedCrossEncoder):
        return rank_pairs(task, lambda queries, documents: model.scores(queries, documents)[0])
    return search(task, model.encode, exported.similarity)


def _texts(collection: Collection | None, task: Task | None) -> tuple[list[str], list[str]]:
    """Queries and documents to compare."""
    if collection is None:
        return list(_TEXTS), list(_TEXTS)
    queries = task.queries if task else collection.queries("all")
    stop = min(COMPARED, len(collection.documents))
    return list(queries.values())[:COMPARED] or list(_TEXTS), list(collection.documents.iter_texts(0, stop))


def _cut(texts: Sequence[str]) -> list[list[str]]:
    return [list(texts[start : start + _CHUNK]) for start in range(0, len(texts), _CHUNK)]
