from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import tiny_export

from retrieval_kd.artifact import Manifest
from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, MissingExtraError, OutputExistsError, RetrievalKDError, UsageError
from retrieval_kd.models.encoders import open_encoder
from retrieval_kd.models.export import export_model
from retrieval_kd.models.export_graphs import GraphWriter
from retrieval_kd.models.exported import open_exported
from retrieval_kd.models.load import find_model
from retrieval_kd.models.parity import (
    Task,
    Tolerance,
    compare_scores,
    compare_vectors,
    make_task,
    rank_pairs,
    search,
    tolerance_of,
)
from retrieval_kd.models.vectors_of_texts import Encoded, MultiVectors, SparseVectors

LOST = np.zeros(2, dtype=np.int32)


@pytest.fixture
def graphs_of(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets a finished export's graphs be written where others would be exported."""

    def use(name: str) -> None:
        folder = tiny_export.exported(shared, name).path

        def copy(writer: GraphWriter, _: Any, __: Any, graph: str) -> None:
            shutil.copy(folder / graph, writer.folder / graph)

        monkeypatch.setattr(GraphWriter, "_graph", copy)

    return use


def test_parity_is_in_the_manifest(shared: Path, collection: Collection, tmp_path: Path, graphs_of: Any) -> None:
    """The nDCG@10 of both is that of a brute-force ranking; vectors of the first queries and documents are compared."""
    graphs_of("dense")
    source = tiny_export.original(shared, "dense")
    arguments: dict[str, Any] = {"format": "onnx", "out": tmp_path / "out", "collection": collection, "split": "test"}
    model = export_model(source, **arguments)
    found = model.manifest.details["parity"]
    encoder: Any = open_encoder(source)
    documents = tiny.unit(encoder.encode(list(collection.documents.iter_texts()), "document").vectors)
    queries = tiny.unit(encoder.encode(list(collection.queries("test").values()), "query").vectors)
    gains = []
    for row, scores in enumerate(queries @ documents.T):
        rank = 1 + int(np.sum(scores > scores[row]))  # document i is the one that query i is judged with
        gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
    assert found["torch"] == pytest.approx(np.mean(gains)) and found["exported"] == found["torch"]
    assert found["ndcg_loss"] == 0 and 0 < found["difference"] < 1e-5 and 0.99999 < found["cosine"] <= 1
    assert (found["compared_queries"], found["queries"], found["documents"]) == (6, 6, 40)
    assert model.manifest.recipe["tolerance"]["min_cosine"] == 0.9999
    assert set(model.manifest.inputs) == {"model", "collection"}
    assert export_model(source, **arguments).fingerprint == model.fingerprint
    with pytest.raises(OutputExistsError, match="tolerance differ"):
        export_model(source, **arguments, tolerance=Tolerance(min_cosine=0.5))


def test_a_wrong_graph_is_not_published(shared: Path, tmp_path: Path, graphs_of: Any) -> None:
    """The graph of a model with other weights: its vectors are far from torch's."""
    other = tiny.make_dense(tmp_path / "other", seed=9)
    graphs_of("dense")
    with pytest.raises(RetrievalKDError, match=r"is too far from torch: difference is .*, allowed 0.001; cosine is"):
        export_model(other, format="onnx", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if "other" not in path.name) == ["out.partial"]
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("tolerance", "message"),
    [
        (Tolerance(max_difference=0), "difference is"),
        (Tolerance(min_kendall_tau=1.5), "kendall tau is 1, allowed 1.5"),
        (Tolerance(max_ndcg_loss=-0.1), "ndcg loss is 0, allowed -0.1"),
    ],
)
def test_every_bound_holds_a_cross_encoder_back(
    shared: Path, collection: Collection, tmp_path: Path, graphs_of: Any, tolerance: Tolerance, message: str
) -> None:
    graphs_of("cross-encoder")
    source = tiny_export.original(shared, "cross-encoder")
    with pytest.raises(RetrievalKDError, match=message):
        export_model(
            source, format="onnx", out=tmp_path / "out", collection=collection, split="test", tolerance=tolerance
        )
    assert not (tmp_path / "out").exists()


def test_tolerances_by_hand() -> None:
    tolerance = Tolerance(max_difference=0.1, min_cosine=0.9, max_ndcg_loss=0.01)
    assert tolerance.broken({"difference": 0.1, "cosine": 0.9, "ndcg_loss": -0.2, "kendall_tau": -1}) == []
    assert tolerance.broken({"difference": float("nan"), "cosine": 0.8, "ndcg_loss": 0.02}) == [
        "difference is nan, allowed 0.1",
        "cosine is 0.8, allowed 0.9",
        "ndcg loss is 0.02, allowed 0.01",
    ]
    assert tolerance_of("onnx-int8", min_cosine=0.8, max_difference=None) == Tolerance(None, 0.8, 0.8, 0.01)


def test_vectors_compared_by_hand() -> None:
    """Rows (3, 4) and (4, 3): cosine 24 / 25, difference 1. An empty sparse vector is like an empty one only."""
    one, other = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [1.0, 0.0]])
    found = compare_vectors([Encoded(one, LOST)], [Encoded(other, LOST)])
    assert found == {"difference": 1.0, "cosine": pytest.approx(0.96)}
    a = SparseVectors(np.array([2, 0]), np.array([1, 5]), np.array([3.0, 4.0]), LOST)
    b = SparseVectors(np.array([2, 0]), np.array([1, 7]), np.array([3.0, 4.0]), LOST)
    assert compare_vectors([a], [b]) == {"difference": 4.0, "cosine": pytest.approx(9 / 25)}
    some = SparseVectors(np.array([2, 1]), np.array([1, 5, 2]), np.array([3.0, 4.0, 1.0]), LOST)
    assert compare_vectors([a], [some])["cosine"] == 0
    with pytest.raises(RetrievalKDError, match="cuts its texts at other places"):
        compare_vectors([Encoded(one, LOST)], [Encoded(one, LOST + 1)])
    tokens = MultiVectors(np.array([1, 1]), one, LOST)
    with pytest.raises(RetrievalKDError, match="another number of token vectors"):
        compare_vectors([tokens], [tokens._replace(lengths=np.array([2, 0]))])
    assert compare_scores(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 2.0])) == {
        "difference": 1.0,
        "kendall_tau": pytest.approx(1 / 3),
    }


def test_texts_without_a_token_have_nothing_to_differ_in() -> None:
    empty = MultiVectors(np.array([0, 0]), np.empty((0, 2), np.float32), LOST)
    assert compare_vectors([empty], [empty]) == {"difference": 0.0, "cosine": 1.0}


def test_an_order_that_was_lost_is_noticed(shared: Path, tmp_path: Path) -> None:
    """Equal scores have no order to keep, but an export that gives all pairs one score has lost torch's."""
    falling, equal = np.array([3.0, 2.0, 1.0]), np.array([2.0, 2.0, 2.0])
    lost = compare_scores(falling, equal)
    assert lost == {"difference": 1.0, "kendall_tau": 0.0}
    assert tolerance_of("onnx-int8").broken(lost) == ["kendall tau is 0, allowed 0.8"]
    assert compare_scores(equal, equal) == {"difference": 0.0}
    one = tiny_encoders.make_collection_of(tmp_path, ["w1 w2"])
    source = tiny_export.original(shared, "cross-encoder")
    parity = export_model(source, format="onnx", out=tmp_path / "out", collection=one).manifest.details["parity"]
    assert "kendall_tau" not in parity and parity["compared_documents"] == 1


def test_maxsim_search_by_hand(collection: Collection) -> None:
    """Query tokens (1,0) and (0,1); a document scores its largest first number plus its largest second one."""
    rows = collection.documents.rows(["d02", "d01", "d00"])
    task = Task("test", {"test-0": "q"}, {"test-0": {"d01": 1}}, rows, collection)
    texts = collection.documents.texts(rows)
    matrices = {texts[0]: [[2, 1]], texts[1]: [], texts[2]: [[0, 3], [1, 0]], "q": [[1, 0], [0, 1]]}

    def encode(some: Any, task: str) -> MultiVectors:
        lengths = np.array([len(matrices[text]) for text in some], dtype=np.int32)
        tokens = [row for text in some for row in matrices[text]]
        return MultiVectors(lengths, np.array(tokens, dtype=np.float32).reshape(-1, 2), np.zeros(len(some), np.int32))

    run = search(task, encode, "maxsim")
    ids, scores = run.hits("test-0")
    assert list(ids) == ["d00", "d02"] and scores.tolist() == [4, 3], "d01 has no token"
    assert search(task, encode, "meanmaxsim").hits("test-0")[1].tolist() == [2, 1.5]


def test_equal_scores_come_by_id_and_blocks_do_not_matter(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(collection, "test", None)

    def encode(texts: Any, task: str) -> Encoded:
        return Encoded(np.ones((len(texts), 2), dtype=np.float32), np.zeros(len(texts), dtype=np.int32))

    expected = [f"d{row:02d}" for row in range(39, 29, -1)]
    for block in (512, 7, 1):
        monkeypatch.setattr("retrieval_kd.models.parity._BLOCK", block)
        run = search(task, encode, "cosine")
        assert all(list(ids) == expected for _, ids, _ in run)


def test_a_sample_holds_the_relevant_documents(collection: Collection) -> None:
    """d00 to d05 are relevant to the 6 queries; the others come by chance, always the same."""
    task = make_task(collection, "test", 10)
    ids = collection.documents.ids_of(task.rows)
    assert len(set(ids)) == 10 and {f"d{i:02d}" for i in range(6)} <= set(ids) and ids == sorted(ids, reverse=True)
    assert make_task(collection, "test", 10).rows.tolist() == task.rows.tolist()
    assert len(make_task(collection, "test", 1000).rows) == 40
    with pytest.raises(InputError, match="has 6 relevant documents"):
        make_task(collection, "test", 5)


def test_pairs_that_are_ranked(collection: Collection) -> None:
    """The judged document and up to 30 others a query; one that scores by its own number ranks d39 or so first."""
    task = make_task(collection, "test", None)
    run = rank_pairs(task, lambda queries, texts: np.array([float(t.split()[0][1:]) for t in texts], np.float32))
    for number, (_, ids, scores) in enumerate(run):
        assert f"d{number:02d}" in ids and 30 <= len(ids) <= 31
        assert [int(i[1:]) for i in ids] == scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_arguments_that_cannot_be_right(
    shared: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], message: str, model: Any = tiny_export, **values: Any) -> None:
        path = tiny_export.original(shared, "dense") if model is tiny_export else model
        with pytest.raises(error, match=message):
            export_model(path, **{"format": "onnx", "out": tmp_path / "out", **values})
        assert not (tmp_path / "out").exists()

    refused(UsageError, r"unknown format 'int8' \(did you mean 'onnx-int8'\?\)", format="int8")
    refused(UsageError, "needs a collection", split="test")
    refused(UsageError, "how many of them", collection=collection, documents=5)
    refused(UsageError, r"1 or more \(got 0\)", collection=collection, split="test", documents=0)
    refused(InputError, "was exported already", tiny_export.exported(shared, "dense").path)
    refused(InputError, "has no modules.json", tiny.make_transformer(tmp_path / "plain"))
    refused(InputError, "has 2 outputs", tiny.make_cross_encoder(tmp_path / "two", outputs=2))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(MissingExtraError, r"pip install 'retrieval-kd\[onnx\]'")


def test_models_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused before a graph is made."""
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

    monkeypatch.setattr(GraphWriter, "_graph", lambda *_: pytest.fail("made"))

    def refused(model: Any, message: str) -> None:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(str(folder))
        with pytest.raises(InputError, match=message):
            export_model(folder, format="onnx", out=tmp_path / "out")

    plain = str(tiny.make_transformer(tmp_path / "plain"))
    refused(SentenceTransformer(modules=[StaticEmbedding(tiny.tokenizer(), embedding_dim=4)]), "starts with a Static")
    pooling = Pooling(16, include_prompt=False)
    refused(SentenceTransformer(modules=[Transformer(plain), pooling], prompts={"query": "query: "}), "out of the pool")
    chat = tiny.tokenizer()
    chat.chat_template = "{{ messages[0]['content'] }}"
    chat.save_pretrained(plain)
    refused(SentenceTransformer(modules=[Transformer(plain), Pooling(16)]), "into a chat template")
    late = MultiVectorEncoder(str(tiny_encoders.make_multi_vector(tmp_path / "late")))
    refused(MultiVectorEncoder(modules=[*late, MultiVectorMask()]), "its MultiVectorMask cannot be exported")


def test_files_and_settings(shared: Path) -> None:
    model = tiny_export.exported(shared, "dense-routed")
    assert sorted(path.name for path in model.path.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "query.onnx",
        "query_tokenizer.json",
        "retrieval_kd.json",
        "tokenizer.json",
    ]
    assert (model.settings["query"]["graph"], model.settings["similarity"]) == ("query.onnx", "dot")
    manifest = Manifest.read(model.path)
    assert manifest.recipe["kind"] == "export" and manifest.details["parity"]["texts"] == "built-in"
    assert open_exported(find_model(model.path)).ref().fingerprint == model.fingerprint
