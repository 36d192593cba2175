"""Dense vectors on disk: a memory-mapped float32 matrix whose row i belongs to id i."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.artifact import Artifact, InputRef, Plan
from retrieval_kd.errors import ArtifactError, UsageError


class Vectors(Artifact):
    """Vectors of a collection's documents or of a split's queries, made by one model."""

    kind = "vectors"

    @cached_property
    def matrix(self) -> np.ndarray:
        """The vectors [n, d] float32, memory-mapped."""
        return np.asarray(np.load(self.path / "vectors.npy", mmap_mode="r"))

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row."""
        return read_ids(self.path / "ids.arrow")

    @property
    def of(self) -> str:
        """``documents`` or ``queries``."""
        return str(self.manifest.details["of"])

    @property
    def split(self) -> str | None:
        """The split of the queries; None for documents."""
        split = self.manifest.details.get("split")
        return None if split is None else str(split)

    @property
    def similarity(self) -> str:
        """``cosine`` or ``dot``: how the model compares its vectors."""
        return str(self.manifest.details["similarity"])

    @property
    def model_ref(self) -> InputRef:
        """The model that made the vectors."""
        entry = self.manifest.inputs["model"]
        path = Path(entry["absolute"]) if "absolute" in entry else None
        return InputRef(entry["fingerprint"], path, entry.get("name"))

    def check_rows(self, ids: Any) -> None:
        """Raises `ArtifactError` unless row i is ``ids[i]`` (Arrow strings: a collection's ids in row order)."""
        if self.ids != ids.to_pylist():
            raise ArtifactError(
                f"{self.path}: its {len(self.ids):,} rows are not the collection's {len(ids):,} documents in their "
                "order; encode the collection again"
            )

    def problems(self) -> list[str]:
        """Rows without an id, or values that are not finite."""
        found = []
        if len(self.ids) != len(self.matrix):
            found.append(f"{len(self.matrix)} rows but {len(self.ids)} ids")
        if len(set(self.ids)) != len(self.ids):
            found.append("ids are not unique")
        step = 65536
        bad = sum(
            int((~np.isfinite(self.matrix[i : i + step]).all(axis=1)).sum()) for i in range(0, len(self.matrix), step)
        )
        if bad:
            found.append(f"{bad} vectors have NaN or infinite values")
        return found


def write_vectors(
    out: str | Path,
    matrix: np.ndarray,
    ids: Sequence[str],
    *,
    of: str,
    split: str | None,
    similarity: str,
    model: InputRef,
    collection: InputRef,
    force: bool = False,
) -> Vectors:
    """The vectors artifact of a matrix [n, d] that was made elsewhere."""
    if len(matrix) != len(ids):
        raise UsageError(f"{len(matrix)} vectors but {len(ids)} ids")
    out = Path(out)
    recipe: dict[str, Any] = {"kind": "import", "of": of, "split": split}
    plan = Plan("vectors", recipe, {"model": model, "collection": collection})
    if plan.finished(out, force=force):
        return Vectors.load(out)
    with plan.write(out, force=force) as draft:
        np.save(draft.path / "vectors.npy", np.ascontiguousarray(matrix, dtype=np.float32))
        write_ids(draft.path / "ids.arrow", ids)
        draft.counts["vectors"] = len(ids)
        draft.details.update({**recipe, "similarity": similarity, "dimension": int(matrix.shape[1])})
    return Vectors.load(out)


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


def read_ids(path: Path) -> list[str]:
    """The ids that `write_ids` wrote."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        ids: list[str] = pa.ipc.open_file(source).read_all()["id"].to_pylist()
    return ids
