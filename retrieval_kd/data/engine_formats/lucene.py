"""Lucene through Anserini or Pyserini: learned sparse vectors as whole-numbered impacts, and topics for queries."""

from __future__ import annotations

import re
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from retrieval_kd.data.engine_formats.engine import EngineFormat, json_text
from retrieval_kd.data.engine_formats.fields import ID, TEXT, TITLE
from retrieval_kd.data.engine_formats.json_rows import maps_json
from retrieval_kd.data.engine_formats.names import TOKENS, TokenNames
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import DataError, first

_TOPICS = 4096
"""Queries that are read at a time."""


class LuceneJsonl(EngineFormat):
    """``{"id", "contents", "vector": {token: whole number}}`` a line: Anserini's JsonVectorCollection.

    White space in a token becomes ``_``. A weight that rounds to 0 is dropped and counted. Queries become
    ``topics.tsv``, in which a token is repeated as often as it weighs.
    """

    name = "lucene-jsonl"
    layouts = MappingProxyType({"sparse": 1 << 31})
    parts = "documents/part-{:05d}.jsonl"
    ids = "without white space"
    quantised = True

    def holds_id(self, doc_id: str) -> bool:
        """Whether a run in TREC's format can name it."""
        return not re.search(r"\s", doc_id)

    def record(self, doc_id: str, fields: dict[str, Any], vector: str | None) -> str:
        """One line; attributes have no place in it."""
        contents = f"{fields.get(TITLE, '')} {fields.get(TEXT, '')}".strip()
        return f'{json_text({ID: doc_id, "contents": contents})[:-1]},"vector":{vector or "{}"}}}'

    def sparse_part(self, vectors: Vectors, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, terms and weights (int64) of some vectors, without those that round to 0."""
        lengths, terms, weights = super().sparse_part(vectors, start, stop)
        whole = np.rint(weights.astype(np.float64) * self.contents.scale).astype(np.int64)
        kept = whole > 0
        if vectors is self.vectors:
            self.counts["dropped_weights"] += int(np.count_nonzero(~kept))
        rows = np.repeat(np.arange(len(lengths)), lengths)[kept]
        return np.bincount(rows, minlength=len(lengths)), terms[kept], whole[kept]

    def sparse_texts(self, lengths: np.ndarray, terms: np.ndarray, weights: np.ndarray) -> list[str]:
        """``{"token":50}``."""
        return maps_json(lengths, self.tokens.json.take(terms), weights)

    def files(self) -> dict[str, Any]:
        """``README.md``, ``tokens.json`` (tokens with another name), and ``topics.tsv`` where there are queries."""
        topics = {"topics.tsv": self._topics(self.contents.queries)} if self.contents.queries else {}
        readme = self.instructions(_README.replace("SCALE", str(self.contents.scale)))
        return {**topics, TOKENS: self.tokens.renamed, "README.md": readme}

    def _topics(self, queries: Vectors) -> str:
        unfit = [query for query in queries.ids if not self.holds_id(query)]
        if unfit:
            raise DataError(f"{queries.path}: {len(unfit)} query ids have white space: {first(unfit)}; give others")
        lines = []
        for start in range(0, len(queries), _TOPICS):
            stop = min(start + _TOPICS, len(queries))
            lengths, terms, weights = self.sparse_part(queries, start, stop)
            ends = np.cumsum(lengths)
            for query, end, length in zip(queries.ids[start:stop], ends.tolist(), lengths.tolist(), strict=True):
                part = slice(end - length, end)
                pairs = zip(terms[part].tolist(), weights[part].tolist(), strict=True)
                words = " ".join(" ".join([self.tokens.names[term]] * weight) for term, weight in pairs)
                lines.append(f"{query}\t{words}\n")
        return "".join(lines)

    @cached_property
    def tokens(self) -> TokenNames:
        """The names of terms."""
        return TokenNames(self.vectors, r"\s", "_")


_README = """# For Lucene, through Anserini or Pyserini

`documents/` is a JsonVectorCollection; a weight is SCALE times the model's, rounded. `topics.tsv` (where queries were
exported) repeats a token as often as it weighs, so that a score is about SCALE × SCALE times the model's. White space
in a token became `_`: `tokens.json` has the name of each token that got another one.

With Java 21 or later and Anserini's jar, which Pyserini has in `resources/jars`:

```bash
java -cp "$ANSERINI_JAR" --add-modules jdk.incubator.vector io.anserini.index.IndexCollection \\
  -collection JsonVectorCollection -input documents -index index -generator DefaultLuceneDocumentGenerator \\
  -threads 4 -impact -pretokenized -optimize
java -cp "$ANSERINI_JAR" --add-modules jdk.incubator.vector io.anserini.search.SearchCollection \\
  -index index -topics topics.tsv -topicReader TsvString -impact -pretokenized -hits 1000 -output run.trec
```
"""
