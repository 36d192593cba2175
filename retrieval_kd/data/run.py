"""Runs: ranked documents for queries, in memory as columns, on disk as an artifact or a TREC file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import Artifact, InputRef, Manifest, is_artifact, resolve
from retrieval_kd.data.trec import read_trec_run, write_trec_run
from retrieval_kd.errors import DataError, OutputExistsError, UsageError
from retrieval_kd.fingerprint import file_sha256
from retrieval_kd.plan import Plan

TREC_SUFFIX = ".trec"
COLUMNS = ("query_id", "doc_id", "score", "rank")


class RunArtifact(Artifact):
    """The directory of a run; `Run.load` reads it."""

    kind = "run"


class Run:
    """For each query its documents by score descending, then document id descending (trec_eval's order).

    Made by `from_hits` or `load`. ``path`` and ``manifest`` are None for a run that is only in memory, ``manifest``
    also for one read from a TREC file.
    """

    def __init__(self, query_ids: list[str], offsets: np.ndarray, doc_ids: Any, scores: np.ndarray) -> None:
        """Takes rows that are in order already; the rows of query i are ``offsets[i]:offsets[i + 1]``."""
        self.query_ids = query_ids
        self.path: Path | None = None
        self.manifest: Manifest | None = None
        self._offsets = offsets
        self._doc_ids = doc_ids
        self._scores = scores
        self._position = {query_id: i for i, query_id in enumerate(query_ids)}

    @classmethod
    def from_hits(cls, query_ids: Sequence[str], doc_ids: Sequence[Sequence[str]], scores: Sequence[np.ndarray]) -> Run:
        """The run of each query's documents and scores, in any order; queries without documents are left out.

        Raises `UsageError` for lengths that differ or a repeated query, `DataError` for a score that is not finite
        as float32 or a document that a query has twice.
        """
        import pyarrow as pa

        if not len(query_ids) == len(doc_ids) == len(scores):
            raise UsageError(f"{len(query_ids)} queries, {len(doc_ids)} lists of documents, {len(scores)} of scores")
        if len(set(query_ids)) != len(query_ids):
            raise UsageError("a query is listed twice")
        lengths = np.array([len(ids) for ids in doc_ids], dtype=np.int64)
        for query_id, length, row in zip(query_ids, lengths, scores, strict=True):
            if len(row) != length:
                raise UsageError(f"query {query_id!r}: {length} documents but {len(row)} scores")
        has_hits = np.flatnonzero(lengths)
        with np.errstate(over="ignore"):  # what overflows is refused as infinite
            flat = np.concatenate([np.asarray(row, dtype=np.float32) for row in scores] or [_NO_SCORES])
        queries = np.repeat(np.arange(len(has_hits)), lengths[has_hits])
        ids = pa.chunked_array([pa.array(chain.from_iterable(doc_ids), pa.string())])
        return _ordered([query_ids[i] for i in has_hits.tolist()], queries, ids, flat, lambda row: "the run")

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """The run at ``path``: an artifact's directory, or a file in the 6-column TREC form.

        A score file is a run as well: its teacher's own ranking of the candidates.
        Of a TREC file the ranks are ignored; of an artifact they must follow score and document id. Raises
        `DataError` for a score that is not finite, a document that a query has twice, or a wrong rank.
        """
        path = Path(path)
        if not path.is_file():
            if is_artifact(path) and Manifest.read(resolve(path)).artifact == "scores":
                return _teachers_ranking(path)
            artifact = RunArtifact.load(path)
            run = _read_artifact(artifact)
            run.path, run.manifest = artifact.path, artifact.manifest
            return run
        trec = read_trec_run(path)
        place: Callable[[int], str] = lambda row: f"{path}:{trec.lines[row]}"  # noqa: E731
        run = _ordered(trec.query_ids, trec.queries, trec.doc_ids, trec.scores, place)
        run.path = path
        return run

    def __len__(self) -> int:
        return len(self.query_ids)

    def __iter__(self) -> Iterator[tuple[str, list[str], np.ndarray]]:
        for query_id in self.query_ids:
            yield query_id, *self.hits(query_id)

    @property
    def total(self) -> int:
        """The number of rows: (query, document) pairs."""
        return len(self._scores)

    def hits(self, query_id: str) -> tuple[list[str], np.ndarray]:
        """The query's document ids and scores [n] float32 in rank order; both empty when it has none."""
        position = self._position.get(query_id)
        if position is None:
            return [], _NO_SCORES.copy()
        start, stop = int(self._offsets[position]), int(self._offsets[position + 1])
        return self._doc_ids.slice(start, stop - start).to_pylist(), self._scores[start:stop]

    def ref(self) -> InputRef:
        """This run as an artifact's input; `UsageError` for a run that is only in memory."""
        if self.path is None:
            raise UsageError("a run that is only in memory cannot be an input; save it and load it")
        if self.manifest is None:
            # A name, not a path: only artifacts are found again by their path.
            return InputRef(file_sha256(self.path), name=str(self.path.resolve()))
        return InputRef(self.manifest.fingerprint, self.path)

    def save(
        self,
        out: str | Path,
        *,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, InputRef],
        details: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> Run:
        """The run as it was written to ``out``: a plain TREC file if that ends in ``.trec``, else a run artifact.

        Raises `OutputExistsError` when ``out`` is something else and not ``force``.
        """
        out = Path(out)
        if out.suffix == TREC_SUFFIX:
            if out.is_dir():
                raise OutputExistsError(f"{out} is a directory; choose another --out")
            write_trec_run(out, self.query_ids, self._offsets, self._doc_ids, self._scores, force=force)
            return Run.load(out)
        plan = Plan("run", recipe, inputs)
        if not plan.finished(out, force=force):
            with plan.write(out, force=force) as draft:
                self._write_parquet(draft.path / "run.parquet")
                draft.counts.update(queries=len(self), hits=self.total)
                draft.details.update(details or {})
        return Run.load(out)

    def _write_parquet(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        lengths = np.diff(self._offsets)
        queries = pa.DictionaryArray.from_arrays(
            pa.array(np.repeat(np.arange(len(self), dtype=np.int32), lengths)), pa.array(self.query_ids, pa.string())
        )
        columns = [queries.cast(pa.string()), self._doc_ids, pa.array(self._scores), pa.array(_ranks(self._offsets))]
        pq.write_table(pa.table(columns, names=list(COLUMNS)), path)


def stream_run(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Each query of the run at ``path`` with its documents in rank order, as `Run.load` has them.

    A run artifact and a score file are read piece by piece, so that memory does not grow with their rows; a TREC file
    is loaded whole, because its rows may come in any order.
    """
    path = Path(path)
    if path.is_file():
        yield from ((query_id, doc_ids) for query_id, doc_ids, _ in Run.load(path))
    elif is_artifact(path) and Manifest.read(resolve(path)).artifact == "scores":
        from retrieval_kd.data.scores import Scores

        for row in Scores.load(path):
            order = np.lexsort((_descending(row.doc_ids), -row.scores))
            yield row.query_id, [row.doc_ids[i] for i in order]
    else:
        yield from _stream_artifact(RunArtifact.load(path).path / "run.parquet")


_NO_SCORES = np.empty(0, dtype=np.float32)
_ROWS_AT_ONCE = 1 << 16


def _stream_artifact(path: Path) -> Iterator[tuple[str, list[str]]]:
    import pyarrow.parquet as pq

    seen: set[str] = set()
    query: str | None = None
    doc_ids: list[str] = []
    scores: list[float] = []
    file = pq.ParquetFile(path, pre_buffer=False)
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["query_id", "doc_id", "score"]):
        for query_id, doc_id, score in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if query_id != query:
                if query is not None:
                    yield query, _in_order(path, query, doc_ids, scores)
                if query_id in seen:
                    raise DataError(f"{path}: the rows of query {query_id!r} are not together; make the run again")
                seen.add(query_id)
                query, doc_ids, scores = query_id, [], []
            doc_ids.append(doc_id)
            scores.append(score)
    if query is not None:
        yield query, _in_order(path, query, doc_ids, scores)


def _in_order(path: Path, query: str, doc_ids: list[str], scores: list[float]) -> list[str]:
    if len(set(doc_ids)) != len(doc_ids):
        raise DataError(f"{path}: query {query!r} has a document twice; make the run again")
    for i in range(1, len(doc_ids)):
        if not (scores[i - 1] > scores[i] or (scores[i - 1] == scores[i] and doc_ids[i - 1] > doc_ids[i])):
            raise DataError(f"{path}: query {query!r}: rank does not follow score and document id; make the run again")
    return doc_ids


def _descending(doc_ids: Sequence[str]) -> np.ndarray:
    """For each id its position when they are sorted descending: the order of equal scores."""
    places = np.empty(len(doc_ids), dtype=np.int64)
    places[sorted(range(len(doc_ids)), key=doc_ids.__getitem__, reverse=True)] = np.arange(len(doc_ids))
    return places


def _ordered(
    query_ids: list[str], queries: np.ndarray, doc_ids: Any, scores: np.ndarray, place: Callable[[int], str]
) -> Run:
    """The run of rows in any order, after they were checked; ``place`` says where a row was read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    _refuse_bad_rows(query_ids, queries, doc_ids, scores, place)
    table = pa.table({"query": queries, "score": scores, "doc": doc_ids})
    order = pc.sort_indices(table, [("query", "ascending"), ("score", "descending"), ("doc", "descending")])
    counts = np.bincount(queries, minlength=len(query_ids))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Run(query_ids, offsets, doc_ids.take(order), scores[order.to_numpy()])


def _refuse_bad_rows(
    query_ids: list[str], queries: np.ndarray, doc_ids: Any, scores: np.ndarray, place: Callable[[int], str]
) -> None:
    infinite = np.flatnonzero(~np.isfinite(scores))
    if len(infinite):
        row = int(infinite[0])
        raise DataError(
            f"{place(row)}: query {query_ids[queries[row]]!r}, document {doc_ids[row].as_py()!r}: "
            f"score {scores[row]} is not finite ({len(infinite)} such rows)"
        )
    repeated = _repetitions(queries, doc_ids)
    if len(repeated):
        row = int(repeated[0])
        raise DataError(
            f"{place(row)}: query {query_ids[queries[row]]!r} has document {doc_ids[row].as_py()!r} twice "
            f"({len(repeated)} such rows)"
        )


def _repetitions(queries: np.ndarray, doc_ids: Any) -> np.ndarray:
    """The rows, ascending, whose query had their document in an earlier row."""
    if not len(queries):
        return np.empty(0, dtype=np.int64)
    encoded = doc_ids.combine_chunks().dictionary_encode()
    keys = queries.astype(np.int64) * len(encoded.dictionary) + encoded.indices.to_numpy()
    order = np.argsort(keys, kind="stable")
    repeated: np.ndarray = np.sort(order[1:][np.diff(keys[order]) == 0])
    return repeated


def _ranks(offsets: np.ndarray) -> np.ndarray:
    """The 1-based rank [n] int32 of each row."""
    ranks = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    ranks -= np.repeat(offsets[:-1], np.diff(offsets)).astype(np.int32)
    return ranks


def _read_artifact(artifact: RunArtifact) -> Run:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = artifact.path / "run.parquet"
    try:
        table = pq.read_table(path, columns=list(COLUMNS), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a run ({error}); make the run again") from error
    for name in COLUMNS:
        if name not in table.column_names or table[name].null_count:
            raise DataError(f"{path}: column '{name}' is missing or has empty rows; make the run again")
    encoded = table["query_id"].combine_chunks().dictionary_encode()
    queries = encoded.indices.to_numpy().astype(np.int64)
    scores = table["score"].to_numpy()
    if scores.dtype != np.float32:
        raise DataError(f"{path}: scores are {scores.dtype}, not float32; make the run again")
    place: Callable[[int], str] = lambda row: f"{path}, row {row}"  # noqa: E731
    run = _ordered(encoded.dictionary.to_pylist(), queries, table["doc_id"], scores, place)
    stored = (queries, table["rank"].to_numpy(), scores)
    expected = (np.repeat(np.arange(len(run)), np.diff(run._offsets)), _ranks(run._offsets), run._scores)
    wrong = np.zeros(run.total, dtype=bool)
    for found, right in zip(stored, expected, strict=True):
        wrong |= found != right
    wrong |= table["doc_id"].to_numpy() != run._doc_ids.to_numpy()
    if wrong.any():
        raise DataError(
            f"{place(int(np.argmax(wrong)))}: rank does not follow score and document id ({int(wrong.sum())} such rows)"
        )
    return run


def _teachers_ranking(path: Path) -> Run:
    from retrieval_kd.data.scores import Scores

    scores = Scores.load(path)
    rows = list(scores)
    run = Run.from_hits([row.query_id for row in rows], [row.doc_ids for row in rows], [row.scores for row in rows])
    run.path, run.manifest = scores.path, scores.manifest
    return run
