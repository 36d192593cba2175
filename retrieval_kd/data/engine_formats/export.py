"""The verb `export` of vectors: documents, settings, an example query and instructions for another search engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.data.engine_formats.engine import SCALE, Contents, EngineFormat
from retrieval_kd.data.engine_formats.fields import Fields
from retrieval_kd.data.engine_formats.json_rows import Parts
from retrieval_kd.data.engine_formats.loading import EngineExport
from retrieval_kd.data.engine_formats.lucene import LuceneJsonl
from retrieval_kd.data.engine_formats.milvus import Milvus
from retrieval_kd.data.engine_formats.qdrant import Qdrant
from retrieval_kd.data.engine_formats.search_servers import Elasticsearch, OpenSearch
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, UsageError, did_you_mean
from retrieval_kd.plan import Draft, Plan
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

FORMATS: dict[str, type[EngineFormat]] = {
    format.name: format for format in (Elasticsearch, LuceneJsonl, Milvus, OpenSearch, Qdrant)
}
"""Name → format of every engine."""

_SAID = {
    "left_out": "documents left out, which have no vector",
    "without_vector": "documents without a vector that {name} takes, which no search for vectors finds",
    "dropped_weights": "weights dropped, which round to 0 (a larger --scale keeps them)",
    "cut_strings": "strings cut to the length that {name} holds",
    "attributes_not_finite": "attributes left out, which are NaN or infinite",
}
"""What a count means, for those that a person must know."""


def export_vectors(
    vectors: str | Path | Vectors,
    *,
    format: str,
    out: str | Path,
    collection: str | Path | Collection | None = None,
    queries: str | Path | Vectors | None = None,
    scale: int | None = None,
    force: bool = False,
) -> EngineExport:
    """The vectors of documents in the files that a search engine loads.

    ``collection`` adds titles, texts and attributes, ``queries`` (vectors of queries) the example of a query, and
    topics for Lucene. ``scale`` is for ``lucene-jsonl``: what weights are multiplied with before they are rounded.

    Raises `UsageError` for an unknown format or one that does not hold such vectors, `DataError` for ids and numbers
    that the engine does not take, `ArtifactError` for vectors of other documents or another model.
    """
    from retrieval_kd.data.sources import open_collection

    if format not in FORMATS:
        raise UsageError(f"unknown format '{format}'{did_you_mean(format, FORMATS)}")
    out, engine = Path(out), FORMATS[format]
    source = vectors if isinstance(vectors, Vectors) else Vectors.load(vectors)
    asked = queries if queries is None or isinstance(queries, Vectors) else Vectors.load(queries)
    opened = None if collection is None else open_collection(collection)
    scale = _scale(engine, scale)
    _refuse_others(engine, source, asked)
    if opened is not None:
        source.check_rows(opened.documents.ids)
    recipe = {"kind": "engine-export", "format": format} | ({"scale": scale} if engine.quantised else {})
    artifacts = {"vectors": source, "collection": opened, "queries": asked}
    plan = Plan("engine-export", recipe, {name: one.ref() for name, one in artifacts.items() if one is not None})
    if plan.finished(out, force=force):
        return EngineExport.load(out)
    with plan.write(out, force=force) as draft:
        _write(engine(Contents(source, Fields(opened), asked, scale)), draft)
    return EngineExport.load(out)


def _write(engine: EngineFormat, draft: Draft) -> None:
    """Fills the draft, and says what was left out or changed."""
    for name, content in engine.files().items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        (draft.path / name).write_text(text, encoding="utf-8")
    with (
        progress(f"exporting for {engine.name}", len(engine.vectors)) as advance,
        Parts(draft.path, engine.parts) as parts,
    ):
        for rows, records in engine.records():
            for record in records:
                parts.write(record)
            advance(rows)
    fields = engine.contents.fields
    counts = {"documents": 0, **engine.counts, **fields.counts}
    draft.counts.update({name: count for name, count in counts.items() if count or name == "documents"})
    for name, meaning in _SAID.items():
        if counts.get(name):
            log.warning("%s: %s: %s", engine.vectors.path, meaning.format(name=engine.name), f"{counts[name]:,}")
    renamed = {column: field for column, field in fields.names.items() if column != field}
    if renamed:
        log.info("attributes by another name: %s", ", ".join(f"{a} is {b}" for a, b in renamed.items()))
    draft.details.update(
        format=engine.name,
        layout=engine.vectors.layout,
        similarity=engine.vectors.similarity,
        dimension=engine.vectors.dimension,
        parts=[engine.parts.format(number) for number in range(1, parts.number + 1)],
        fields=fields.names,
    )


def _scale(engine: type[EngineFormat], scale: int | None) -> int:
    if scale is not None and not engine.quantised:
        raise UsageError(f"a scale is for weights that become whole numbers; {engine.name} holds them as they are")
    if scale is not None and scale < 1:
        raise UsageError(f"a scale is 1 or more (got {scale})")
    return SCALE if scale is None else scale


def _refuse_others(engine: type[EngineFormat], vectors: Vectors, queries: Vectors | None) -> None:
    """Raises for vectors that are not of documents or not of a layout that fits, and for queries of another model."""
    if vectors.of != "documents":
        raise UsageError(f"{vectors.path}: vectors of {vectors.of}; give vectors of documents, and these as --queries")
    if vectors.layout not in engine.layouts:
        fitting = [name for name, other in FORMATS.items() if vectors.layout in other.layouts]
        raise UsageError(
            f"{vectors.path}: {engine.name} holds {' or '.join(engine.layouts)} vectors, these are {vectors.layout} "
            f"ones; formats for them: {', '.join(fitting)}"
        )
    if queries is None:
        return
    if queries.of != "queries":
        raise UsageError(f"{queries.path}: vectors of {queries.of}; --queries are vectors of queries")
    if vectors.model_ref.fingerprint not in queries.stands_for or queries.layout != vectors.layout:
        raise ArtifactError(
            f"{queries.path}: its model is not the one of {vectors.path}; encode queries with the documents' model"
        )
