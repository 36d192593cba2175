"""The verb `scores convert`: score files of other tools become score artifacts, and the other way round."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.artifact import InputRef
from retrieval_kd.atomic import writing_to
from retrieval_kd.data.score_formats import (
    flagembedding,
    hofstaetter,
    pylate,
    sentence_transformers,
    st_pickle,
    tevatron,
    trec,
)
from retrieval_kd.data.score_formats.export import Export, Written, refuse_existing
from retrieval_kd.data.score_formats.grouping import Spill
from retrieval_kd.data.score_formats.pairs import Pairs, Source, refuse_bad_pairs
from retrieval_kd.data.score_formats.records import JSON, PARQUET, refuse_suffix
from retrieval_kd.data.score_kinds import SCORE_KINDS
from retrieval_kd.data.scores import ScoredQuery, Scores, write_shard
from retrieval_kd.data.sources import open_collection
from retrieval_kd.errors import DataError, InputError, UsageError, did_you_mean, first
from retrieval_kd.fingerprint import file_sha256
from retrieval_kd.plan import Draft, Plan
from retrieval_kd.progress import progress

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection

log = logging.getLogger("retrieval_kd")

OWN = "retrieval-kd"
IMPORTED = "imported"
_PAIRS_PER_SHARD = 131_072
_NEEDS = "a positive and enough negatives"


@dataclass(frozen=True)
class Format:
    """A layout of another tool: how it is read and written, and what writing it needs."""

    summary: str
    read: Callable[[Source], Iterator[Pairs]]
    write: Callable[[Export], None] | None
    sides: bool = False
    """It tells positives from negatives."""
    texts: bool = False
    """It holds texts."""
    suffixes: tuple[str, ...] = ()
    """How the name of a written file must end; empty for plain lines, whose names are free."""


FORMATS = {
    "flagembedding": Format(
        "query, pos, neg, pos_scores, neg_scores in JSONL",
        flagembedding.read,
        flagembedding.write,
        sides=True,
        texts=True,
        suffixes=JSON,
    ),
    "hofstaetter-tsv": Format(
        "pos_score, neg_score, query id, pos id, neg id with tabs", hofstaetter.read, hofstaetter.write, sides=True
    ),
    "pylate": Format(
        "query_id, document_ids, scores in Parquet or JSONL", pylate.read, pylate.write, suffixes=(PARQUET, *JSON)
    ),
    "sentence-transformers": Format(
        "query, positive, negative_1 … and label in Parquet or JSONL",
        sentence_transformers.read,
        sentence_transformers.write,
        sides=True,
        texts=True,
        suffixes=(PARQUET, *JSON),
    ),
    "st-pickle": Format("a pickled {query id: {document id: score}}; only read", st_pickle.read, None),
    "tevatron": Format(
        "query and passages with scores in JSONL",
        tevatron.read,
        tevatron.write,
        sides=True,
        texts=True,
        suffixes=JSON,
    ),
    "trec": Format("the 6-column run file", trec.read, trec.write),
}
"""The layouts besides our own, ``retrieval-kd``."""


def convert_scores(
    source: str | Path,
    *,
    from_format: str,
    to_format: str,
    out: str | Path,
    collection: str | Path | Collection | None = None,
    labels: str | None = None,
    negatives: int | None = None,
    score_kind: str | None = None,
    force: bool = False,
) -> Scores | Written:
    """The scores of ``source`` in another layout: `Scores` for ``to_format`` ``retrieval-kd``, else what was `Written`.

    ``collection`` finds the ids of texts and checks those of a file that is read, and gives the texts that are written
    (by default the collection that the score file was made with). ``labels`` is the split whose qrels say which
    documents are positive; without it a query's best one is. ``negatives`` is the number a row of
    sentence-transformers has, by default the smallest number that a query has: queries with more get several rows, of
    which the last repeats some. ``score_kind``, one of `SCORE_KINDS`, says what an imported score is. Raises
    `DataError` with file and line for wrong content, `UsageError` for arguments that do not fit the formats.
    """
    source, out = Path(source), Path(out)
    _refuse_arguments(from_format, to_format, labels, negatives, score_kind)
    if to_format != OWN:
        refuse_suffix(out, to_format, FORMATS[to_format].suffixes)
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    opened = None if collection is None else open_collection(collection)
    if to_format == OWN:
        return _import(source, from_format, out, opened, score_kind or IMPORTED, force)
    refuse_existing(out, force)
    needed = FORMATS[to_format].texts or labels is not None
    if needed and from_format != OWN and opened is None:
        raise UsageError(f"{source}: {from_format} does not say of which collection it is; name it with --collection")
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=out.parent) as folder:
            if from_format == OWN:
                scores = Scores.load(source)
            else:
                scores = _import(source, from_format, Path(folder) / "scores", opened, IMPORTED, force)
            texts = _texts(scores, opened, needed=needed)
            relevant = None if labels is None or texts is None else texts.qrels(labels)
            export = Export(source, scores, out, texts, relevant, negatives, force)
            if from_format != OWN:
                export.counts["empty_queries"] = scores.manifest.counts["empty_queries"]
            return _export(to_format, export)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turns what the system says of temporary files into an error that names ``out``."""
    try:
        with writing_to(out):
            yield
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error


def _texts(scores: Scores, collection: Collection | None, *, needed: bool) -> Collection | None:
    """The collection of a score file: the one given if it is that, else, when ``needed``, where its manifest says."""
    if collection is None:
        return open_collection(scores.locate("collection")) if needed else None
    recorded = scores.manifest.inputs.get("collection")
    if recorded is not None and recorded["fingerprint"] != collection.fingerprint:
        raise InputError(f"{scores.path}: these scores are of another collection than {collection.path}")
    return collection


def _refuse_arguments(
    from_format: str, to_format: str, labels: str | None, negatives: int | None, score_kind: str | None
) -> None:
    for option, name in (("--from", from_format), ("--to", to_format)):
        if name not in FORMATS and name != OWN:
            raise UsageError(f"{option} {name}: unknown format{did_you_mean(name, [*FORMATS, OWN])}")
    if from_format == to_format:
        raise UsageError(f"--from and --to are both {from_format}: nothing to convert")
    target = FORMATS.get(to_format)
    if target is not None and target.write is None:
        raise UsageError(f"--to {to_format}: this format is only read")
    if labels is not None and (target is None or not target.sides):
        raise UsageError(f"--labels: {to_format} does not tell positives from negatives")
    if negatives is not None and (to_format != "sentence-transformers" or negatives < 1):
        raise UsageError(f"--negatives {negatives}: only for --to sentence-transformers, and at least 1")
    if score_kind is not None and target is not None:
        raise UsageError(f"--score-kind: {to_format} does not say what a score is")
    if score_kind is not None and score_kind not in SCORE_KINDS:
        raise UsageError(f"--score-kind {score_kind}: unknown kind of score{did_you_mean(score_kind, SCORE_KINDS)}")


def _import(path: Path, name: str, out: Path, collection: Collection | None, score_kind: str, force: bool) -> Scores:
    if not path.is_file():
        raise InputError(f"{path}: a directory; {name} is one file")
    recipe = {"kind": "import", "format": name, "source": path.name, "score_kind": score_kind}
    # A name, not a path: only artifacts are found again by their path.
    inputs = {"source": InputRef(file_sha256(path), name=str(path.resolve()))}
    if collection is not None:
        inputs["collection"] = collection.ref()
    plan = Plan("scores", recipe, inputs)
    if plan.finished(out, force=force):
        return Scores.load(out)
    source = Source(path, collection, entries=name == "st-pickle")
    with plan.write(out, force=force) as draft:
        with Spill(draft.work) as spill:
            for pairs in FORMATS[name].read(source):
                refuse_bad_pairs(pairs, source)
                spill.add(pairs)
            log.info("%s: read %s pairs; grouping them by query", path, f"{spill.rows:,}")
            _write_shards(spill, source, draft)
        independent = score_kind != "rank"
        draft.details.update(score_kind=score_kind, teacher="import", independent=independent, format=name)
    if source.empty:
        message = "%s: %s queries have an empty list of documents and are left out: %s"
        log.warning(message, path, f"{len(source.empty):,}", first(source.empty))
    return Scores.load(out)


def _write_shards(spill: Spill, source: Source, draft: Draft) -> None:
    counts: Counter[str] = Counter(queries=0, pairs=0, shards=0, repeated_pairs=0)
    files: list[Path] = []
    with progress("pairs", spill.rows) as advance:
        for rows in _shards(spill.queries(source, counts)):
            files.append(draft.path / f"shard-{len(files):05d}")
            query_ids, doc_ids, scores, _ = zip(*rows, strict=True)
            for query_id in query_ids:
                source.empty.pop(query_id, None)
            write_shard(files[-1], query_ids, doc_ids, scores, {})
            pairs = sum(map(len, doc_ids))
            counts.update(queries=len(rows), pairs=pairs, shards=1)
            advance(pairs)
    if not files:
        raise DataError(f"{source.path}: no scored pairs in it")
    for file in files:
        file.rename(file.with_name(f"{file.name}-of-{len(files):05d}.parquet"))
    draft.counts.update(counts | {"empty_queries": len(source.empty)})


def _shards(rows: Iterator[ScoredQuery]) -> Iterator[list[ScoredQuery]]:
    """The rows in groups of at most ``_PAIRS_PER_SHARD`` pairs, more if one query alone has more."""
    shard: list[ScoredQuery] = []
    size = 0
    for row in rows:
        if shard and size + len(row.doc_ids) > _PAIRS_PER_SHARD:
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += len(row.doc_ids)
    if shard:
        yield shard


def _export(name: str, export: Export) -> Written:
    write = FORMATS[name].write
    assert write is not None
    queries = len(export.scores)
    try:
        write(export)
        if len(export.left_out) == queries:
            raise DataError(f"{export.source}: none of its {queries} queries has what {name} needs ({_NEEDS})")
        for temporary, final in reversed(export.temporary.items()):
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(final)
    finally:
        for temporary in export.temporary:
            temporary.unlink(missing_ok=True)
    counts = {"queries": queries - len(export.left_out), "queries_left_out": len(export.left_out), **export.counts}
    if export.left_out:
        message = "%s of %s queries are not in %s, which needs of each %s: %s"
        log.warning(message, len(export.left_out), queries, export.out, _NEEDS, first(export.left_out))
    return Written(export.out, counts)
