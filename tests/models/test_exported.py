from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_export

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError
from retrieval_kd.indexes.build import build_index
from retrieval_kd.models.encode import encode
from retrieval_kd.models.encoder import BadVectorsError
from retrieval_kd.models.encoders import open_encoder
from retrieval_kd.models.export_reference import open_reference
from retrieval_kd.models.exported import ExportedCrossEncoder, ExportedSparse, open_exported
from retrieval_kd.models.exported_tokenizer import TextTokenizer
from retrieval_kd.models.load import Model, find_model
from retrieval_kd.models.token_pooling import pooled
from retrieval_kd.models.vectors_of_texts import MultiVectors, SparseVectors, strongest

TEXTS = [
    "w1",
    "",
    "w2 w3 w1 w5 w1",
    "unknown words",
    "w9 " * 30,
    *(tiny.document_text(row) for row in range(9)),
    " ".join(tiny.WORDS),
]


def parts(vectors: Any) -> list[np.ndarray]:
    """A list of texts' vectors as arrays of one row a text, so that texts can be compared one by one."""
    if isinstance(vectors, SparseVectors):
        rows = np.zeros((len(vectors.lengths), 68), dtype=np.float32)
        rows[np.repeat(np.arange(len(rows)), vectors.lengths), vectors.terms] = vectors.weights
        return list(rows)
    if isinstance(vectors, MultiVectors):
        return np.split(vectors.tokens, np.cumsum(vectors.lengths)[:-1])
    return list(vectors.vectors)


@pytest.mark.parametrize("name", [name for name in tiny_export.MAKERS if name != "cross-encoder"])
def test_vectors_and_cuts_are_those_of_torch(shared: Path, name: str) -> None:
    """Queries and documents of 0 to 60 words, all at once and one by one, with prompts and lengths."""
    model = tiny_export.exported(shared, name)
    encoder = open_encoder(model.path)
    assert encoder.layout == model.manifest.details["layout"]
    torch_encoder: Any = open_reference(find_model(tiny_export.original(shared, name)))
    for task in ("query", "document"):
        expected = torch_encoder.encode(TEXTS, task)
        found: Any = encoder.encode(TEXTS, task)
        assert [len(part) for part in parts(found)] == [len(part) for part in parts(expected)]
        for one, other in zip(parts(found), parts(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(found.tokens_lost, expected.tokens_lost)
        assert {array.dtype for array in found} == {array.dtype for array in expected}
        for place in (0, 2, len(TEXTS) - 1):
            (alone,) = parts(encoder.encode(TEXTS[place : place + 1], task))
            np.testing.assert_allclose(alone, parts(expected)[place], rtol=0, atol=1e-5)
    assert encoder.truncation.texts > torch_encoder.truncation.texts > 0
    assert encoder.similarity == torch_encoder.similarity and list(encoder.vocabulary) == list(torch_encoder.vocabulary)
    assert encoder.stands_for == {model.fingerprint, torch_encoder.ref().fingerprint}
    assert all(len(array) == 0 for array in encoder.encode([], "query"))


def test_cuts_and_prompts_by_hand(shared: Path) -> None:
    """8 tokens of a query: [CLS] query : 30 words [SEP] are 34. Facts say how texts are read."""
    encoder = open_encoder(tiny_export.exported(shared, "dense").path)
    assert encoder.encode(["w9 " * 30, "w1"], "query").tokens_lost.tolist() == [34 - 8, 0]
    assert encoder.truncation.to_json() == {"truncated_texts": 1, "tokens_lost": 26}
    facts = encoder.facts()
    assert facts["prompts"] == tiny_export.PROMPTS and facts["dtype"] == "float32"
    assert (facts["query_max_length"], facts["max_length"], facts["format"]) == (8, 16, "onnx")


def test_queries_of_an_inference_free_model_are_looked_up(shared: Path) -> None:
    """Word ``wI`` weighs I / 10; w0 and unknown words weigh nothing; no graph is opened."""
    folder = tiny_export.exported(shared, "inference-free").path
    encoder = open_exported(find_model(folder))
    assert isinstance(encoder, ExportedSparse)
    found = encoder.encode(["w7 w3 w7", "w0 nothing"], "query")
    assert found.lengths.tolist() == [2, 0] and found.terms.tolist() == [5 + 3, 5 + 7]
    np.testing.assert_allclose(found.weights, [0.3, 0.7], rtol=1e-6)
    assert not encoder._sessions
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "query.npy",
        "query_tokenizer.json",
        "retrieval_kd.json",
        "tokenizer.json",
        "vocabulary.json",
    ]


def test_sparse_vectors_are_pruned_as_the_model_says(shared: Path) -> None:
    """The two heaviest terms of a document, then those above the threshold; queries keep all."""
    source = find_model(tiny_export.exported(shared, "sparse").path)
    whole = open_exported(source)
    assert isinstance(whole, ExportedSparse)
    pruning = {"document": {"top_terms": 2, "threshold": 0.5}}
    cut = ExportedSparse(source, {**whole.settings, "pruning": pruning})
    texts = TEXTS[5:9]
    for one, other in zip(parts(cut.encode(texts, "document")), parts(whole.encode(texts, "document")), strict=True):
        kept = [i for i in np.argsort(-other, kind="stable")[:2] if other[i] > 0.5]
        np.testing.assert_allclose(one[kept], other[kept], atol=1e-6)
        assert np.count_nonzero(one) == len(kept)
    np.testing.assert_array_equal(cut.encode(texts, "query").terms, whole.encode(texts, "query").terms)
    assert parts(cut.bare().encode(texts, "document"))[0].sum() > parts(cut.encode(texts, "document"))[0].sum()


def test_strongest_terms_by_hand() -> None:
    terms, weights = np.array([1, 4, 6, 9]), np.array([0.5, 0.2, 0.5, 0.9])
    assert strongest(terms, weights, threshold=0.2)[0].tolist() == [1, 6, 9]
    assert strongest(terms, weights, top_terms=2)[0].tolist() == [1, 9]
    assert strongest(terms, weights, threshold=0.9, top_terms=2)[1].tolist() == []


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_int8_is_near(shared: Path, name: str) -> None:
    parity = tiny_export.exported(shared, name, "onnx-int8").manifest.details["parity"]
    assert 0.97 < parity["cosine"] < 0.99999 and parity["difference"] > 1e-4
    encoder = open_encoder(tiny_export.exported(shared, name, "onnx-int8").path)
    assert encoder.facts()["dtype"] == "int8"
    expected: Any = open_encoder(tiny_export.exported(shared, name).path)
    for one, other in zip(parts(encoder.encode(TEXTS, "query")), parts(expected.encode(TEXTS, "query")), strict=True):
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.95


def test_scores_of_a_cross_encoder(shared: Path) -> None:
    """The logits of ``predict`` without its sigmoid; of long pairs the longer text is cut first."""
    model = tiny_export.exported(shared, "cross-encoder")
    encoder = open_exported(find_model(model.path))
    assert isinstance(encoder, ExportedCrossEncoder)
    queries, documents = ["w1 w2"] * len(TEXTS), TEXTS
    reference: Any = open_reference(find_model(tiny_export.original(shared, "cross-encoder")))
    scores, lost = encoder.scores(queries, documents)
    np.testing.assert_allclose(scores, reference.scores(queries, documents), atol=1e-5)
    assert lost.tolist() == [max(0, 5 + len(text.split()) - 32) for text in documents]
    facts = encoder.facts()
    assert (facts["max_length"], facts["prompts"], facts["dtype"]) == (32, {}, "float32")
    with pytest.raises(InputError, match="makes no vectors"):
        open_encoder(model.path)


def test_bad_vectors_name_their_texts(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(tiny_export.exported(shared, "dense").path)
    encoder = open_exported(source)
    encoder._sessions["model.onnx"] = lambda f: np.where(f["input_ids"][:, :1] > 0, np.nan, 0)  # type: ignore[assignment]
    with pytest.raises(BadVectorsError, match=r"2 of 2 query texts \(first: 'w1'\)") as caught:
        encoder.encode(["w1", "w2"], "query")  # type: ignore[union-attr]
    assert caught.value.texts == ["w1", "w2"]


def test_a_model_that_was_not_exported(dense: Path) -> None:
    with pytest.raises(InputError, match="is not an exported one"):
        open_exported(find_model(dense))


def test_padding_on_the_left_and_expansion_by_hand(tmp_path: Path) -> None:
    """[CLS] is 2, [SEP] 3, word wI 5 + I; a query is filled up to 5 tokens by 4, which only they themselves see."""
    tiny.tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer": "tokenizer.json",
        "special_tokens": True,
        "prompt": "",
        "max_length": 6,
        "cut_side": "left",
        "padding": {"side": "left", "id": 0, "type_id": 0},
    }
    reader = TextTokenizer(tmp_path, settings)
    tokens = reader.tokens(["w1", "w1 w2 w3 w4 w5 w6"])
    assert tokens.ids == [[2, 6, 3], [2, 8, 9, 10, 11, 3]] and tokens.lost.tolist() == [0, 2]
    found = reader.padded(tokens, [0, 1])
    assert found["input_ids"].tolist() == [[0, 0, 0, 2, 6, 3], [2, 8, 9, 10, 11, 3]]
    assert found["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    pairs = reader.tokens(["w1"], ["w2"])
    assert pairs.ids == [[2, 6, 3, 7, 3]] and pairs.types == [[0, 0, 0, 1, 1]]
    expansion = {"length": 5, "id": 4, "attend": False}
    right = {**settings, "padding": {"side": "right", "id": 0, "type_id": 0}, "expansion": expansion}
    reader = TextTokenizer(tmp_path, right)
    found = reader.padded(reader.tokens(["w1", "w1 w2 w3 w4 w5 w6"]), [0, 1])
    assert found["input_ids"].tolist()[0] == [2, 6, 3, 4, 4, 0]
    assert found["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0, 0]
    assert found["filled"].tolist() == [[False] * 3 + [True] * 2 + [False], [False] * 6]


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 7.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_token_pooling_is_that_of_sentence_transformers(factor: float, normalize: bool) -> None:
    import torch
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    module = HierarchicalTokenPooling(factor, num_protected_tokens=2, normalize_embeddings=normalize)
    names = ("pool_factor", "num_protected_tokens", "normalize_embeddings")
    settings = {name: getattr(module, name) for name in names}
    rng = np.random.default_rng(4)
    for tokens in (0, 1, 2, 3, 5, 24):
        matrix = tiny.unit(rng.normal(size=(tokens, 8))).astype(np.float32)
        expected = module.pool_one(torch.from_numpy(matrix)).numpy()
        np.testing.assert_allclose(pooled(matrix, settings), expected, atol=1e-6)
        assert pooled(matrix, None) is matrix


def run_alone(program: str) -> dict[str, Any]:
    """What a program prints last, as JSON, run in a process of its own."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


HEAVY = '[name for name in ("torch", "transformers", "sentence_transformers") if name in sys.modules]'


@pytest.fixture
def index(shared: Path, collection: Collection, tmp_path: Path) -> Path:
    """A flat index over the vectors of the torch model."""
    vectors = encode(tiny_export.original(shared, "dense"), collection, tmp_path / "vectors")
    recipe = tiny.write_recipe(tmp_path / "flat.yaml", {"kind": "faiss", "factory": "Flat"})
    return build_index(recipe, vectors=vectors.path, out=tmp_path / "index").path


def test_a_query_needs_no_torch(shared: Path, index: Path) -> None:
    """An index made with torch answers an exported model's queries; torch and transformers are never imported."""
    from retrieval_kd.search.searcher import Searcher

    folders = [tiny_export.exported(shared, name).path for name in ("sparse", "inference-free", "multi-vector")]
    found = run_alone(f"""
import json, sys
from retrieval_kd.models.encoders import open_encoder
from retrieval_kd.search.searcher import Searcher
for folder in {[str(folder) for folder in folders]}:
    open_encoder(folder).encode(["w1 w41"], "query")
searcher = Searcher.load({str(index)!r}, model={str(tiny_export.exported(shared, "dense").path)!r})
hits = searcher.search("w1 w41", 5)
print(json.dumps({{"heavy": {HEAVY}, "hits": [[hit.doc_id, hit.score] for hit in hits]}}))
""")
    assert found["heavy"] == []
    hits = Searcher.load(index).search("w1 w41", 5)
    assert [hit[0] for hit in found["hits"]] == [hit.doc_id for hit in hits]
    np.testing.assert_allclose([hit[1] for hit in found["hits"]], [hit.score for hit in hits], atol=1e-5)


def test_the_exported_model_is_checked_and_described(shared: Path) -> None:
    model = tiny_export.exported(shared, "multi-vector")
    assert isinstance(model, Model)
    query = model.settings["query"]
    assert query["expansion"] == {"length": 6, "id": 4, "attend": False}
    assert query["mask"] == {"skip": [], "only": []} and query["token_pooling"] is None
    document = model.settings["document"]
    assert document["mask"] == {"skip": [5 + 1, 67], "only": []}
    assert document["token_pooling"] == {"pool_factor": 2.0, "num_protected_tokens": 1, "normalize_embeddings": True}
