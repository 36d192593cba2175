"""What an index costs: milliseconds a query, bytes a document, documents encoded a second."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.artifact import MANIFEST, Manifest, locate_input, resolve
from retrieval_kd.errors import ArtifactError
from retrieval_kd.indexes.base import input_names

if TYPE_CHECKING:
    from retrieval_kd.search.searcher import Searcher

log = logging.getLogger("retrieval_kd")

WARM_UP = 3
HITS = 10
_BESIDE = {"ids.arrow", "rank.npy", "attributes.arrow", "deleted.npy", MANIFEST}
"""Files that say which documents the rows are: every engine has them. Segments have manifests of their own."""


@dataclass(frozen=True)
class Efficiency:
    """The costs of one index; None where the artifacts do not tell."""

    milliseconds_per_query: float
    timed_queries: int
    bytes_per_document: float
    documents_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def measure_efficiency(index: Path, searcher: Searcher, queries: Sequence[str], count: int) -> Efficiency:
    """The costs of the index at ``index``, which ``searcher`` searches.

    The time is that of ``searcher.search``, from one text to its ten hits, encoding included: the median over the
    first ``count`` of ``queries`` after `WARM_UP` others that are not counted.
    """
    manifest = Manifest.read(resolve(index))
    timed = list(queries[:count])
    return Efficiency(
        milliseconds_per_query=_median_milliseconds(searcher, timed, list(queries[-WARM_UP:])),
        timed_queries=len(timed),
        bytes_per_document=bytes_per_document(index, manifest),
        documents_per_second=documents_per_second(index, manifest),
    )


def bytes_per_document(index: Path, manifest: Manifest) -> float:
    """Bytes of an index's files, ids and attributes apart, over its live documents.

    Raises `ArtifactError` when it counts none.
    """
    documents = manifest.counts.get("documents", 0)
    if documents < 1:
        raise ArtifactError(f"{index}: its manifest counts no documents; build the index again")
    size = sum(entry["bytes"] for name, entry in manifest.files.items() if Path(name).name not in _BESIDE)
    return float(size / documents)


def documents_per_second(index: Path, manifest: Manifest) -> float | None:
    """The speed at which the vectors of an index were encoded, as their manifest says; None when they are not there.

    An index without vectors (BM25) has none, and neither have vectors that were imported or moved away.
    """
    names = input_names(manifest.inputs, "vectors")
    texts, seconds = 0, 0.0
    for name in names:
        try:
            vectors = Manifest.read(resolve(locate_input(resolve(index), manifest, name)))
        except ArtifactError as error:
            log.warning("the report leaves the encoding speed open: %s", error)
            return None
        speed = vectors.details.get("texts_per_second")
        if not speed:
            return None
        texts += vectors.counts["vectors"]
        seconds += vectors.counts["vectors"] / speed
    return texts / seconds if names else None


def machine() -> dict[str, str | int]:
    """The machine that the times were taken on, in words, and its number of logical processors."""
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "processor": _processor(), "threads": os.cpu_count() or 1}


def _median_milliseconds(searcher: Searcher, timed: Sequence[str], warm_up: Sequence[str]) -> float:
    for query in warm_up:
        searcher.search(query, HITS)
    seconds = []
    for query in timed:
        start = time.perf_counter()
        searcher.search(query, HITS)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
