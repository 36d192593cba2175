from pathlib import Path

import pytest

from retrieval_kd.artifact import InputRef, Manifest
from retrieval_kd.errors import ArtifactError
from retrieval_kd.eval import efficiency
from retrieval_kd.eval.efficiency import documents_per_second, measure_efficiency
from retrieval_kd.plan import Plan


class SlowSearcher:
    """Takes a time that the query says, on a clock that only it moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.asked: list[tuple[str, int]] = []
        monkeypatch.setattr(efficiency.time, "perf_counter", lambda: self.now)

    def search(self, query: str, k: int) -> list[object]:
        self.asked.append((query, k))
        self.now += float(query)
        return []


def make_vectors(path: Path, speed: float | None, number: int = 4) -> InputRef:
    with Plan("vectors", {"kind": "import"}, {}).write(path) as draft:
        (draft.path / "vectors.npy").write_bytes(b"12")
        if speed:
            draft.details["texts_per_second"] = speed
        draft.counts["vectors"] = number
    return InputRef(Manifest.read(path).fingerprint, path)


def make_index(path: Path, *, documents: int = 4, vectors: InputRef | None = None) -> Path:
    inputs = {"vectors": vectors} if vectors else {}
    with Plan("index", {"kind": "faiss"}, inputs).write(path, generation="gen-000001") as draft:
        (draft.path / "index.faiss").write_bytes(bytes(100))
        (draft.path / "native").mkdir()
        (draft.path / "native" / "more.bin").write_bytes(bytes(30))
        (draft.path / "ids.arrow").write_bytes(bytes(1000))
        for name in ("rank.npy", "attributes.arrow", "deleted.npy", "native/rank.npy", "native/manifest.json"):
            (draft.path / name).write_bytes(bytes(1000))
        draft.counts["documents"] = documents
    return path


def test_costs_by_hand(tmp_path, monkeypatch):
    searcher = SlowSearcher(monkeypatch)
    queries = ["1", "0.002", "0.004", "5", "6", "7"]
    index = make_index(tmp_path / "index", vectors=make_vectors(tmp_path / "vectors", 250.0))
    costs = measure_efficiency(index, searcher, queries, 3)
    # Three warm-up searches, which are not counted, then the first three: 1 s, 2 ms and 4 ms, whose median is 4 ms.
    assert [query for query, _ in searcher.asked] == ["5", "6", "7", "1", "0.002", "0.004"]
    assert {k for _, k in searcher.asked} == {10}
    assert costs.milliseconds_per_query == pytest.approx(4.0)
    assert costs.timed_queries == 3
    assert costs.bytes_per_document == 130 / 4
    assert costs.documents_per_second == 250.0


def test_the_encoding_speed_is_unknown_without_vectors(tmp_path, caplog):
    plain = make_index(tmp_path / "plain")
    assert documents_per_second(plain, Manifest.read(plain / "gen-000001")) is None
    imported = make_index(tmp_path / "imported", vectors=make_vectors(tmp_path / "v", None))
    assert documents_per_second(imported, Manifest.read(imported / "gen-000001")) is None
    assert not caplog.records
    (tmp_path / "v").rename(tmp_path / "moved")
    assert documents_per_second(imported, Manifest.read(imported / "gen-000001")) is None
    assert "not at" in caplog.text and str(tmp_path / "v") in caplog.text


def test_the_encoding_speed_of_several_vectors(tmp_path):
    """100 texts at 50 a second and 300 at 100: 400 in 5 seconds."""
    inputs = {"vectors": make_vectors(tmp_path / "a", 50.0, 100), "vectors_2": make_vectors(tmp_path / "b", 100.0, 300)}
    with Plan("index", {"kind": "faiss"}, inputs).write(tmp_path / "index"):
        pass
    assert documents_per_second(tmp_path / "index", Manifest.read(tmp_path / "index")) == 80.0


def test_an_index_without_documents_is_refused(tmp_path, monkeypatch):
    index = make_index(tmp_path / "index", documents=0)
    with pytest.raises(ArtifactError, match="counts no documents"):
        measure_efficiency(index, SlowSearcher(monkeypatch), ["1"], 1)
