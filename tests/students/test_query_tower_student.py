from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_dense

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, InputError, RecipeError, UsageError
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.decode import decode_index
from retrieval_kd.models.encode import encode
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.models.load import Model
from retrieval_kd.recipe import validate
from retrieval_kd.search.searcher import Searcher
from retrieval_kd.students.development import VectorEvaluator
from retrieval_kd.students.query_tower import QueryTowerStudent
from retrieval_kd.students.train import train

Trained = Callable[..., Model]


@pytest.fixture(scope="module")
def narrow(shared: Path) -> Path:
    """A teacher of 8 dimensions, compared by cosine."""
    return tiny_dense.make_narrow(shared / "tower-teacher")


@pytest.fixture(scope="module")
def documents(shared: Path, collection: Collection, narrow: Path) -> Path:
    return encode(narrow, collection, shared / "tower-documents").path


@pytest.fixture(scope="module")
def queries(shared: Path, collection: Collection, narrow: Path) -> Path:
    return encode(narrow, collection, shared / "tower-queries", queries="train").path


@pytest.fixture
def tower(fit: Trained) -> Trained:
    def run(**values: Any) -> Model:
        return fit(**{"kind": "query-tower", "losses": [{"kind": "embedding"}], **values})

    return run


def closeness(model: Path, queries: Path, collection: Collection) -> float:
    """Mean cosine of the model's and the teacher's vectors of the training queries."""
    found = DenseEncoder.load(model).encode_queries(list(collection.queries("train").values()))
    return float((tiny.unit(found) * tiny.unit(Vectors.load(queries).matrix)).sum(axis=1).mean())


def test_query_vectors_alone_are_enough(
    tower: Trained, queries: Path, narrow: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No score file, no document: a student of 16 dimensions learns the 8 of its teacher through a projection."""
    from sentence_transformers import SentenceTransformer

    read: list[str] = []
    preprocess = SentenceTransformer.preprocess

    def reading(self: Any, texts: Any, *arguments: Any, **options: Any) -> Any:
        read.extend(texts)
        return preprocess(self, texts, *arguments, **options)

    both = [{"kind": "embedding"}, {"kind": "embedding", "distance": "cosine"}]
    inputs = {"teacher_vectors": [queries]}
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "preprocess", reading)
        model = tower(inputs=inputs, losses=both, steps=60, learning_rate=2e-2)
    texts = set(collection.queries("train").values())
    assert texts <= set(read) and not {text for text in read if text.startswith("w")} - texts
    start = tower(inputs=inputs, steps=0)
    assert closeness(start.path, queries, collection) < 0.5 < 0.9 < closeness(model.path, queries, collection)
    log = tiny.log_rows(model.path)[0]
    # of unit vectors the squared distance is twice one minus the cosine
    assert float(log["embedding"]) == pytest.approx(2 * float(log["embedding_2"]), abs=2e-4)
    stock = SentenceTransformer(str(model.path), device="cpu")
    assert [type(module).__name__ for module in stock] == ["Transformer", "Pooling", "Dense", "Normalize"]
    np.testing.assert_allclose(
        stock.encode_query(["w1 w41"]), DenseEncoder.load(model.path).encode_queries(["w1 w41"]), atol=1e-6
    )
    fingerprint = Vectors.load(queries).model_ref.fingerprint
    assert model.settings["queries_for"] == {"fingerprint": fingerprint, "similarity": "cosine"}
    assert model.settings["similarity"] == "cosine" and model.manifest.counts["queries"] == 30
    assert fingerprint[:12] in (model.path / "README.md").read_text()


def test_scores_are_with_the_teachers_documents(collection: Collection, queries: Path, documents: Path) -> None:
    """3 · cosine of the student's query vector and the frozen document vector, and losses on vectors see queries."""
    import torch

    from retrieval_kd.students.collate import TeacherVectors

    student, model = made(collection, [queries, documents], scale={"initial": 3})
    vectors = TeacherVectors([Vectors.load(queries), Vectors.load(documents)], collection)
    batch = tiny_dense.make_batch()
    columns = student.tokenize(model, batch)
    assert all(key.startswith("query_") for key in columns)
    matrix = torch.tensor(tiny.unit(np.asarray(vectors.documents[:3]))) if vectors.documents is not None else None
    labels = {name: torch.from_numpy(getattr(batch, name)) for name in ("column", "present", "teacher", "relevant")}
    labels |= {"teacher_documents": matrix, "teacher_queries": torch.eye(2, 8)}
    features = {key.removeprefix("query_"): value for key, value in columns.items()}
    outputs = student.outputs(model, {}, [features], labels)
    q = torch.tensor(tiny.unit(model.encode_query(tiny_dense.QUERIES)))
    assert matrix is not None and outputs.vectors is not None and outputs.teacher_vectors is not None
    torch.testing.assert_close(outputs.batch_scores, 3 * q @ matrix.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.scores, outputs.batch_scores.gather(1, labels["column"]))
    torch.testing.assert_close(outputs.vectors, q, atol=1e-5, rtol=1e-5)
    assert outputs.teacher_vectors.tolist() == torch.eye(2, 8).tolist()


def made(collection: Collection, vectors: list[Path], **values: Any) -> tuple[QueryTowerStudent, Any]:
    """A tower on the tiny dense model and its network in evaluation mode."""
    from retrieval_kd.students.collate import TeacherVectors

    base = vectors[0].parent / "dense"
    tiny.make_dense(base)
    recipe = validate(QueryTowerStudent.Recipe, {"kind": "query-tower", "base": str(base), **values}, "made")
    student = QueryTowerStudent(recipe)
    student.teach(TeacherVectors([Vectors.load(path) for path in vectors], collection))
    model: Any = student.start()
    return student, model.eval().to("cpu")


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_finds_in_the_teachers_index(
    similarity: str, tower: Trained, scores: Path, collection: Collection, tmp_path: Path
) -> None:
    """With KL over the group it learns to find each query's document among the teacher's vectors."""
    teacher = tiny_dense.make_narrow(tmp_path / "teacher", similarity=similarity)
    files = [
        encode(teacher, collection, tmp_path / "queries", queries="train"),
        encode(teacher, collection, tmp_path / "documents"),
    ]
    inputs = {"teacher_vectors": [file.path for file in files], "scores": [scores]}
    matrix = np.asarray(files[1].matrix)
    goal = np.asarray(files[0].matrix)

    def agreement(model: Path) -> float:
        found = DenseEncoder.load(model).encode_queries(list(collection.queries("train").values()))
        rows = [np.array([(i + j) % 40 for j in range(6)]) for i in range(30)]
        u = tiny.unit if similarity == "cosine" else np.asarray
        mine, theirs = u(found) @ u(matrix).T, u(goal) @ u(matrix).T
        return float(np.mean([np.corrcoef(mine[i, r], theirs[i, r])[0, 1] for i, r in enumerate(rows)]))

    losses = [{"kind": "embedding"}, {"kind": "kl", "over": "batch", "weight": 0.2}]
    model = tower(inputs=inputs, losses=losses, steps=60, learning_rate=2e-2)
    start = tower(inputs=inputs, losses=losses, steps=0)
    assert agreement(model.path) > agreement(start.path) + 0.4
    assert model.settings["queries_for"]["similarity"] == model.settings["similarity"] == similarity


def test_killed_and_resumed_gives_the_same_bytes(tower: Trained, resumed_equals: Trained, queries: Path) -> None:
    values: dict[str, Any] = {
        "inputs": {"teacher_vectors": [queries]},
        "steps": 9,
        "development": {"against": "teacher", "times": 3},
    }
    resumed = resumed_equals(tower, values, goes_on_from=3, evaluator=VectorEvaluator)
    assert resumed.manifest.details["development"]["measure"] == "cosine"


def test_development_by_hand() -> None:
    """Cosines 1 and 0.6: their mean is 0.8, whatever the lengths."""

    class Fixed:
        def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.array([[2.0, 0.0], [3.0, 4.0]])

    assert VectorEvaluator(["a", "b"], np.array([[1.0, 0.0], [5.0, 0.0]]))(Fixed())["development"] == pytest.approx(0.8)


def test_development_on_labels_ranks_the_teachers_documents(
    tower: Trained, queries: Path, documents: Path, collection: Collection
) -> None:
    development = {"against": "qrels", "split": "dev", "measure": "RR@10", "documents": 40, "times": 1}
    model = tower(inputs={"teacher_vectors": [queries, documents]}, steps=2, development=development)
    found = DenseEncoder.load(model.path).encode_queries(list(collection.queries("dev").values()))
    scores = tiny.unit(found) @ tiny.unit(np.asarray(Vectors.load(documents).matrix)).T
    ranks = [int((scores[i] > scores[i, i]).sum()) + 1 for i in range(6)]
    expected = float(np.mean([1 / rank if rank <= 10 else 0 for rank in ranks]))
    assert model.manifest.details["development"]["best"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UsageError, match="against the qrels needs --teacher-vectors of the documents"):
        tower(inputs={"teacher_vectors": [queries]}, steps=2, development=development)


def test_refusals(tower: Trained, queries: Path, documents: Path, candidates: Path) -> None:
    with pytest.raises(UsageError, match="needs the teacher's vectors"):
        tower(inputs={})
    with pytest.raises(UsageError, match="a query-tower learns the teacher's vectors"):
        tower(inputs={}, steps=0)
    with pytest.raises(UsageError, match="over the batch needs documents"):
        tower(inputs={"teacher_vectors": [queries, documents]}, losses=[{"kind": "kl", "over": "batch"}])
    with pytest.raises(UsageError, match="needs a teacher's scores"):
        tower(inputs={"teacher_vectors": [queries]}, losses=[{"kind": "kl"}])
    with pytest.raises(InputError, match="do not cover all queries of split 'dev'"):
        tower(inputs={"teacher_vectors": [queries]}, split="dev")
    with pytest.raises(InputError, match="do not cover the documents and all queries"):
        tower(inputs={"teacher_vectors": [queries], "candidates": candidates}, groups={"positive": "qrels"})
    with pytest.raises(RecipeError, match="measure: cosine"):
        tower(inputs={"teacher_vectors": [queries]}, development={"against": "teacher", "measure": "nDCG@10"})
    with pytest.raises(RecipeError, match="unknown key 'similarity'"):
        tower(inputs={"teacher_vectors": [queries]}, similarity="dot")


def test_searches_the_teachers_index(
    tower: Trained, queries: Path, narrow: Path, dense: Path, collection: Collection, tmp_path: Path
) -> None:
    """Hits are the cosines of the tower's query and the teacher's documents; another model is still refused."""
    index = build_index("flat", collection=collection, model=narrow, out=tmp_path / "index")
    model = tower(inputs={"teacher_vectors": [queries]}, steps=2)
    query = DenseEncoder.load(model.path).encode_queries(["w3 w43"])
    documents = DenseEncoder.load(narrow).encode_documents(list(collection.documents.iter_texts()))
    cosines = (tiny.unit(query) @ tiny.unit(documents).T)[0]
    hits = Searcher.load(index.path, model=model.path).search("w3 w43", k=3)
    assert [hit.doc_id for hit in hits] == tiny.ids_of(np.argsort(-cosines)[:3].tolist())
    assert [hit.score for hit in hits] == pytest.approx(np.sort(cosines)[::-1][:3].tolist(), abs=1e-5)
    with pytest.raises(ArtifactError, match="is not the model that"):
        Searcher.load(index.path, model=dense)


def test_recipe(queries: Path, collection: Collection, dense: Path, tmp_path: Path) -> None:
    overrides = [f"base={dense}", "layers=[1]", "steps=2", "batch_size=8"]
    out = tmp_path / "tower"
    model = train("query-tower", collection=collection, teacher_vectors=[queries], out=out, overrides=overrides)
    assert [row["step"] for row in tiny.log_rows(model.path) if row["loss"]] == ["1", "2"]


def test_it_encodes_no_documents(tower: Trained, queries: Path, collection: Collection, tmp_path: Path) -> None:
    model = tower(inputs={"teacher_vectors": [queries]}, steps=0)
    with pytest.raises(UsageError, match="is a query tower: it never learned documents"):
        encode(model.path, collection, tmp_path / "vectors")
    assert len(encode(model.path, collection, tmp_path / "vectors", queries="test").ids) == 6


@pytest.fixture(scope="module")
def decoded(shared: Path, documents: Path) -> Path:
    """What a coarse index of the teacher's documents has left of them: two bits a number, no longer of unit length."""
    recipe = tiny.write_recipe(shared / "coarse.yaml", {"kind": "faiss", "factory": "PQ2x2"})
    index = build_index(recipe, vectors=documents, out=shared / "coarse-index")
    return decode_index(index.path, shared / "decoded").path


def test_scores_are_with_decoded_documents_and_targets_with_whole_ones(
    collection: Collection, queries: Path, documents: Path, decoded: Path
) -> None:
    """3 · the inner product of a unit query and the decoded vector as it is; the teacher's scores are its cosines."""
    import torch

    from retrieval_kd.students.collate import GroupCollator, TeacherVectors
    from retrieval_kd.students.groups import TrainingQuery
    from retrieval_kd.students.sampling import Groups

    files = [Vectors.load(path) for path in (queries, documents, decoded)]
    student, model = made(collection, [queries, documents, decoded], scale={"initial": 3, "learned": False})
    assert student.similarity == "cosine"
    asked = [
        TrainingQuery(name, text, np.array([i, i + 7]), np.array([2.0, 1.0]), np.array([True, False]))
        for i, (name, text) in enumerate(list(collection.queries("train").items())[:2])
    ]
    vectors = TeacherVectors(files, collection)
    made_of = GroupCollator(student, model, collection, asked, Groups(documents=2), 0, vectors)
    batch = made_of([{"query": 0, "visit": 0}, {"query": 1, "visit": 0}])
    labels = batch.pop("label")
    features = {key.removeprefix("query_"): value for key, value in batch.items()}
    outputs = student.outputs(model, {}, [features], labels)
    rows = [0, 1, 7, 8]
    left, whole = files[2].matrix[rows], tiny.unit(np.asarray(files[1].matrix[rows]))
    assert np.abs(np.linalg.norm(left, axis=1) - 1).max() > 0.01
    q = tiny.unit(model.encode_query([query.text for query in asked]))
    assert outputs.batch_scores is not None and outputs.batch_teacher is not None
    np.testing.assert_allclose(outputs.batch_scores.detach(), 3 * q @ left.T, atol=1e-5)
    targets = tiny.unit(np.asarray(files[0].matrix[:2])) @ whole.T
    np.testing.assert_allclose(outputs.batch_teacher, targets, atol=1e-5)
    found = student.pool_scores(model, [query.text for query in asked], collection.documents, np.array(rows))
    np.testing.assert_allclose(found, q @ left.T, atol=1e-5)
    assert isinstance(labels["decoded_documents"], torch.Tensor)


def test_learns_to_make_up_for_what_an_index_lost(
    tower: Trained, queries: Path, documents: Path, decoded: Path, scores: Path, collection: Collection
) -> None:
    """The same tower, trained against decoded documents, gives an index's scores nearer to the teacher's own."""
    goal = tiny.unit(np.asarray(Vectors.load(queries).matrix)) @ tiny.unit(np.asarray(Vectors.load(documents).matrix)).T
    left = np.asarray(Vectors.load(decoded).matrix)

    def divergence(model: Path) -> float:
        """The mean KL of the teacher's distribution over all documents and that of the index."""
        found = tiny.unit(DenseEncoder.load(model).encode_queries(list(collection.queries("train").values())))
        p, log_q = softmax(goal / 0.05), np.log(softmax(found @ left.T / 0.05))
        return float((p * (np.log(p) - log_q)).sum(axis=1).mean())

    values: dict[str, Any] = {
        "losses": [{"kind": "kl", "over": "batch", "teacher_temperature": 0.05}],
        "scale": {"initial": 20, "learned": False},
        "groups": {"documents": 6},
        "steps": 60,
        "learning_rate": 1e-2,
    }
    both = [queries, documents]
    without = tower(inputs={"teacher_vectors": both, "scores": [scores]}, **values)
    with_codes = tower(inputs={"teacher_vectors": [*both, decoded], "scores": [scores]}, **values)
    assert divergence(with_codes.path) < 0.9 * divergence(without.path)
    assert with_codes.settings["queries_for"] == without.settings["queries_for"]
    assert with_codes.settings["similarity"] == "cosine"


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def test_decoded_documents_are_for_towers_alone(
    tower: Trained, fit: Trained, queries: Path, documents: Path, decoded: Path, scores: Path
) -> None:
    everything = {"teacher_vectors": [queries, documents, decoded], "scores": [scores]}
    with pytest.raises(UsageError, match="what an index decodes teaches queries alone: train a query-tower"):
        fit(inputs=everything, losses=[{"kind": "kl"}])
    with pytest.raises(InputError, match="do not cover the documents and all queries"):
        tower(inputs={**everything, "teacher_vectors": [queries, decoded]}, losses=[{"kind": "kl"}])
    with pytest.raises(UsageError, match=r"set development\.against to nothing or qrels"):
        tower(inputs=everything, development={"against": "teacher"})


def test_recipe_against_an_index(
    queries: Path, documents: Path, decoded: Path, scores: Path, dense: Path, collection: Collection, tmp_path: Path
) -> None:
    overrides = [f"base={dense}", "steps=2", "batch_size=8"]
    files = {"teacher_vectors": [queries, documents, decoded], "scores": [scores]}
    out = tmp_path / "tower"
    model = train("query-tower-index", collection=collection, **files, out=out, overrides=overrides)
    assert [row["step"] for row in tiny.log_rows(model.path) if row["loss"]] == ["1", "2"]
