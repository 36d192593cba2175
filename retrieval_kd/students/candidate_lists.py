"""Candidates of queries as arrays, read from score files and runs: eight bytes a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import ArtifactError

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval_kd.data.collection import Documents
    from retrieval_kd.data.run import Run
    from retrieval_kd.data.scores import Scores

_SHARDS_AT_ONCE = 64
_QUERIES_AT_ONCE = 1000


class CandidateLists:
    """Reads lists of rows and scores in portions; a document's id is looked up once a portion."""

    def __init__(self, documents: Documents, query_ids: list[str]) -> None:
        self.documents = documents
        self.query_ids = query_ids
        self.not_finite: dict[str, int] = {}
        """Query id → how many of its scores are NaN or infinite."""

    def lists(self, scores: Sequence[Scores], candidates: Run | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Query id → rows int32 and scores float32, best first, a document once: as the first file has it."""
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for file in scores:
            for query_id, rows, values in self._scored(file):
                if not np.isfinite(values).all():
                    bad = ~np.isfinite(values)
                    self.not_finite[query_id] = self.not_finite.get(query_id, 0) + int(bad.sum())
                    values[bad] = np.nan
                parts.setdefault(query_id, []).append((rows, values))
        if candidates is not None:
            for query_id, rows in self._listed(candidates):
                parts.setdefault(query_id, []).append((rows, np.full(len(rows), np.nan, dtype=np.float32)))
        found = ((query_id, _best_first(parts.pop(query_id))) for query_id in list(parts))
        return {query_id: arrays for query_id, arrays in found if len(arrays[0])}

    def relevant(self, qrels: dict[str, dict[str, int]]) -> dict[str, np.ndarray]:
        """Query id → rows of its relevant documents, of queries that have any."""
        found = {}
        for query_id, judged in qrels.items():
            ids = [doc_id for doc_id, relevance in judged.items() if relevance > 0]
            if ids:
                found[query_id] = self.documents.rows(ids).astype(np.int32)
        return found

    def _scored(self, file: Scores) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        for start in range(0, len(file.shards), _SHARDS_AT_ONCE):
            table = pa.concat_tables([self._wanted(shard) for shard in file.shards[start : start + _SHARDS_AT_ONCE]])
            lengths = pc.list_value_length(table["doc_ids"]).to_numpy()
            ends = np.cumsum(lengths)
            rows = self._rows(pc.list_flatten(table["doc_ids"]))
            values = pc.list_flatten(table["scores"]).to_numpy()
            for query_id, begin, end in zip(table["query_id"].to_pylist(), ends - lengths, ends, strict=True):
                yield query_id, rows[begin:end], values[begin:end].copy()

    def _wanted(self, shard: Path) -> pa.Table:
        """The shard's lists of the queries that are trained on."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from retrieval_kd.data.scores import read_shard

        table = read_shard(shard)
        if pc.list_value_length(table["doc_ids"]) != pc.list_value_length(table["scores"]):
            raise ArtifactError(f"{shard}: a query has more documents than scores, or fewer; make the file again")
        found: pa.Table = table.filter(pc.is_in(table["query_id"], value_set=pa.array(self.query_ids, pa.string())))
        return found

    def _listed(self, run: Run) -> Iterator[tuple[str, np.ndarray]]:
        import pyarrow as pa

        ids = [query_id for query_id in self.query_ids if len(run.hits(query_id)[1])]
        for start in range(0, len(ids), _QUERIES_AT_ONCE):
            part = ids[start : start + _QUERIES_AT_ONCE]
            hits = [run.hits(query_id)[0] for query_id in part]
            rows = self._rows(pa.chunked_array([pa.array(doc_ids, pa.string()) for doc_ids in hits]))
            yield from zip(part, np.split(rows, np.cumsum([len(doc_ids) for doc_ids in hits])[:-1]), strict=True)

    def _rows(self, doc_ids: Any) -> np.ndarray:
        """The rows int32 of a chunked array of ids; each distinct one is looked up once."""
        encoded = doc_ids.combine_chunks().dictionary_encode()
        rows = self.documents.rows(encoded.dictionary.to_pylist()).astype(np.int32)
        return np.asarray(rows[encoded.indices.to_numpy()])


def _best_first(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    rows, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    _, firsts = np.unique(rows, return_index=True)
    firsts.sort()
    rows, values = rows[firsts], values[firsts]
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    return rows[order], values[order]
