from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.data import collection as collection_module
from retrieval_kd.data import collection_writer
from retrieval_kd.data.collection import Collection, Document, id_hash
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import ArtifactError, DataError, InputError, OutputExistsError, UsageError
from retrieval_kd.plan import Plan


@pytest.fixture
def pets(beir: Path, tmp_path: Path) -> Collection:
    return make_collection(str(beir), tmp_path / "out")


def test_rows_follow_the_source(pets: Collection) -> None:
    documents = pets.documents
    assert len(documents) == 5
    assert documents.ids.to_pylist() == ["d1", "d3", "d2", "d5", "d4"]
    assert documents.id(1) == "d3"
    assert documents.ids_of(np.array([4, 0])) == ["d4", "d1"]
    assert documents[1] == Document("d3", "", "Dogs bark", {"year": 2001})
    assert documents[0].attributes == {"year": None}
    assert [document.id for document in documents] == ["d1", "d3", "d2", "d5", "d4"]


def test_models_read_title_and_text(pets: Collection) -> None:
    expected = ["Cats sleep all day", "Dogs bark", "Empty", "", "Dogs bark"]
    assert list(pets.documents.iter_texts()) == expected
    assert list(pets.documents.iter_texts(1, 3)) == expected[1:3]
    assert list(pets.documents.iter_texts(4)) == expected[4:]
    assert pets.documents.texts([4, 0]) == ["Dogs bark", "Cats sleep all day"]
    assert pets.documents.text(2) == "Empty"


def test_ids_are_found(pets: Collection) -> None:
    assert pets.documents.row("d4") == 4
    rows = pets.documents.rows(["d5", "d1", "d5"])
    assert rows.dtype == np.int64
    assert rows.tolist() == [3, 0, 3]
    assert pets.documents.rows([]).tolist() == []
    with pytest.raises(DataError, match=r"4 of 5 document ids are unknown: 'a', 'b', 'c', …"):
        pets.documents.rows(["a", "d1", "b", "c", "d"])
    with pytest.raises(IndexError, match="no row 5"):
        pets.documents.id(5)
    with pytest.raises(IndexError, match="no row -1"):
        pets.documents.text(-1)


def test_queries_and_qrels_by_split(pets: Collection) -> None:
    assert pets.name == "pets"
    assert pets.splits == ["test", "train"]
    assert list(pets.queries("test").items()) == [("q2", "who barks"), ("q1", "who sleeps")]
    assert pets.queries("train") == {"q2": "who barks"}
    assert list(pets.queries("all")) == ["q2", "q1", "q3"]
    assert pets.qrels("test") == {"q1": {"d1": 2, "d3": 0}, "q2": {"d4": 1}}
    for read in (pets.queries, pets.qrels):
        with pytest.raises(InputError, match=r"no split 'dev'.*test, train.*'all'"):
            read("dev")


def test_counts(pets: Collection) -> None:
    assert pets.manifest.counts == {
        "documents": 5,
        "empty_documents": 1,
        "duplicate_texts": 1,
        "queries": 3,
        "empty_queries": 0,
        "repeated_qrels": 0,
        "qrels_test": 3,
        "qrels_train": 1,
    }
    assert pets.problems() == []


def test_many_batches(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_writer, "BATCH_ROWS", 2)
    pets = make_collection(str(beir), tmp_path / "out")
    assert pets.documents.ids.num_chunks == 3
    assert [pets.documents.row(i) for i in ("d1", "d3", "d2", "d5", "d4")] == [0, 1, 2, 3, 4]
    assert list(pets.documents.iter_texts(1, 4)) == ["Dogs bark", "Empty", ""]
    assert [pets.documents.id(row) for row in range(5)] == ["d1", "d3", "d2", "d5", "d4"]
    assert pets.problems() == []


def test_equal_hashes_are_told_apart(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (collection_module, collection_writer):
        monkeypatch.setattr(module, "id_hash", lambda text: 7)
    pets = make_collection(str(beir), tmp_path / "out")
    assert pets.documents.rows(["d4", "d1", "d5"]).tolist() == [4, 0, 3]
    with pytest.raises(DataError, match="'d9'"):
        pets.documents.row("d9")


def test_the_same_work_is_done_once(beir: Path, tmp_path: Path, pets: Collection) -> None:
    again = make_collection(str(beir), tmp_path / "out")
    assert again.manifest.created == pets.manifest.created
    assert again.fingerprint == make_collection(str(beir), tmp_path / "elsewhere").fingerprint
    with pytest.raises(OutputExistsError, match="sample differ"):
        make_collection(str(beir), tmp_path / "out", sample=2)
    (beir / "queries.jsonl").write_text('{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "y"}\n')
    with pytest.raises(OutputExistsError, match="another source"):
        make_collection(str(beir), tmp_path / "out")
    assert make_collection(str(beir), tmp_path / "out", force=True).queries("all") == {"q1": "x", "q2": "y"}


def test_sample(beir: Path, tmp_path: Path) -> None:
    order = sorted(["d1", "d2", "d3", "d4", "d5"], key=id_hash)
    sample = make_collection(str(beir), tmp_path / "out", sample=2)
    assert set(sample.documents.ids.to_pylist()) == set(order[:2])
    assert sample.name == "pets-sample-2"
    kept = set(order[:2])
    test = {"q1": {"d1": 2, "d3": 0}} if "d1" in kept else {}
    test = {q: {d: r for d, r in judged.items() if d in kept} for q, judged in test.items()}
    test |= {"q2": {"d4": 1}} if "d4" in kept else {}
    train = {"q2": {"d3": 1}} if "d3" in kept else {}
    assert sample.qrels("test") == test
    assert sample.qrels("train") == train
    assert set(sample.queries("all")) == set(test) | set(train)
    assert sample.problems() == []


def test_a_sample_keeps_queries_with_a_relevant_document(beir: Path, tmp_path: Path) -> None:
    """d3 is relevant for q2 in train, and judged not relevant for q1 in test: q1 is lost with d1."""
    ranks = {"d3": 1, "d4": 2, "d1": 3, "d2": 4, "d5": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection_writer, "id_hash", lambda text: ranks.get(text, id_hash(text)))
        patch.setattr(collection_module, "id_hash", lambda text: ranks.get(text, id_hash(text)))
        sample = make_collection(str(beir), tmp_path / "out", sample=1)
        assert sample.documents.ids.to_pylist() == ["d3"]
        assert sample.queries("all") == {"q2": "who barks"}
        assert sample.qrels("train") == {"q2": {"d3": 1}}
        assert sample.qrels("test") == {}
        assert (sample.manifest.counts["qrels_test"], sample.manifest.counts["qrels_train"]) == (0, 1)


def test_a_large_sample_is_everything(beir: Path, tmp_path: Path) -> None:
    assert len(make_collection(str(beir), tmp_path / "out", sample=5).queries("all")) == 3
    with pytest.raises(UsageError, match="--sample 0"):
        make_collection(str(beir), tmp_path / "none", sample=0)


def test_damage_is_found(pets: Collection) -> None:
    file = pets.path / "documents.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"documents\.arrow differs from its checksum"):
        Collection.load(pets.path)


def rewritten(pets: Collection, out: Path, change: Any) -> Collection:
    """A collection whose files were changed before it was sealed."""
    with Plan("collection", {"source": "x", "sample": None}, {}).write(out) as draft:
        for name in pets.manifest.files:
            target = draft.path / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((pets.path / name).read_bytes())
        draft.counts.update(pets.manifest.counts)
        draft.details.update(pets.manifest.details)
        change(draft)
    return Collection.load(out)


def test_problems_name_wrong_counts_and_unknown_ids(pets: Collection, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def change(draft: Any) -> None:
        draft.counts["queries"] = 4
        table = pa.table({"query_id": ["q1", "q9"], "doc_id": ["d1", "d8"], "relevance": pa.array([1, 1], pa.int32())})
        pq.write_table(table, draft.path / "qrels" / "train.parquet")

    assert rewritten(pets, tmp_path / "changed", change).problems() == [
        "qrels of split train name 1 unknown document ids: 'd8'",
        "qrels of split train name 1 unknown query ids: 'q9'",
        "queries: 3 on disk, 4 in the manifest",
        "qrels_train: 2 on disk, 1 in the manifest",
    ]


def test_problems_name_repeated_ids_and_a_wrong_lookup(pets: Collection, tmp_path: Path) -> None:
    import pyarrow as pa

    def repeat(draft: Any) -> None:
        texts = ["a", "b", "c", "d", "e"]
        table = pa.table({"id": ["d1", "d3", "d2", "d1", "d4"], "title": texts, "text": texts})
        with pa.ipc.new_file(str(draft.path / "documents.arrow"), table.schema) as writer:
            writer.write_table(table)

    assert "document ids are not unique: 'd1'" in rewritten(pets, tmp_path / "a", repeat).documents.problems()

    def lose(draft: Any) -> None:
        lookup = np.load(draft.path / "lookup.npy")
        lookup[0, 0] = 0
        np.save(draft.path / "lookup.npy", lookup)

    lost = sorted(["d1", "d2", "d3", "d4", "d5"], key=id_hash)[0]
    assert rewritten(pets, tmp_path / "b", lose).documents.problems() == [f"lookup.npy does not find 1 ids: '{lost}'"]
