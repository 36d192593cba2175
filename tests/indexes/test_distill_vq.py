"""Distill-VQ: what it trains, that it ends in a stock FAISS index, and that a build resumes with the same bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import yaml
from tiny_distill_vq import World, make_world, overlap
from tiny_score_files import make_scores

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import ArtifactError, InputError, RecipeError, UsageError
from retrieval_kd.indexes.base import Index, Shape, Source
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.distill_vq import distillation, teaching
from retrieval_kd.indexes.distill_vq.codebooks import Codebooks, fast_scan, filled
from retrieval_kd.indexes.distill_vq.engine import DistillVQIndex
from retrieval_kd.indexes.distill_vq.layout import layout_of
from retrieval_kd.indexes.distill_vq.recipe import DistillVQRecipe, Training
from retrieval_kd.indexes.distill_vq.teaching import Documents, Lesson, Pupils, pseudo_queries, split
from retrieval_kd.indexes.distill_vq.training import LearnedCodebooks, Lessons, relevance_loss
from retrieval_kd.plan import Draft

Embed = Callable[..., Vectors]
Build = Callable[..., Index]
GENTLE = {"temperature": 0.2, "learning_rate": 0.003, "reconstruction": 1.0}
QUICK = {"epochs": 2, "batch": 32, "documents": 8, "top": 50, "learning_rate": 0.01, "centroid_learning_rate": 0.01}
FACTORIES = ["PQ4x4", "OPQ4,PQ4x4", "IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4", "RQ4x4", "IVF4,RQ4x4", "IVF4,Flat"]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture
def build(tmp_path: Path, embed: Embed, world: World) -> Build:
    """A function that builds an index of the world's documents, and learns from its queries unless told otherwise."""

    def make(factory: str, name: str = "index", *, queries: bool = True, scores: Any = (), **keys: Any) -> Index:
        training = {**QUICK, **keys.pop("training", {})}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"kind": "distill-vq", "factory": factory, "training": training, **keys}))
        documents = vectors_of(embed, world.documents, "documents")
        asked = vectors_of(embed, world.queries, "queries", of="queries", split="train") if queries else None
        return build_index(recipe, vectors=documents, queries=asked, scores=scores, out=tmp_path / name)

    return make


def vectors_of(embed: Embed, matrix: np.ndarray, name: str, **changes: Any) -> Vectors:
    """The vectors artifact of that name, made once in a test."""
    made: dict[str, Vectors] = embed.__dict__.setdefault("made", {})
    if name not in made:
        made[name] = embed(matrix, name=name, **changes)
    return made[name]


def decoded(index: Index) -> np.ndarray:
    """The documents [n, d] that the codes of ``index.faiss`` stand for, as queries see them; decoded by hand."""
    stock = whole = faiss.read_index(str(index.path / "index.faiss"))
    rotation = np.eye(stock.d, dtype=np.float32)
    if isinstance(stock, faiss.IndexPreTransform):
        step = faiss.downcast_VectorTransform(stock.chain.at(0))
        rotation = faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in)
        stock = faiss.downcast_index(whole.index)
    layout = layout_of(index.manifest.recipe["factory"])
    vectors = np.zeros((stock.ntotal, stock.d), dtype=np.float32)
    words = None
    if layout.parts:
        values = stock.pq.centroids if layout.product else stock.rq.codebooks
        words = faiss.vector_to_array(values).reshape(layout.parts, 1 << layout.bits, -1)
    if not layout.lists:
        codes = faiss.vector_to_array(stock.codes).reshape(stock.ntotal, -1)
        return said(codes, layout, words, stock.d) @ rotation
    flat = faiss.downcast_index(stock.quantizer)
    centroids = faiss.rev_swig_ptr(flat.get_xb(), stock.nlist * stock.d).reshape(stock.nlist, -1)
    for number in range(stock.nlist):
        size = stock.invlists.list_size(number)
        if not size:
            continue
        rows = faiss.rev_swig_ptr(stock.invlists.get_ids(number), size).copy()
        codes = faiss.rev_swig_ptr(stock.invlists.get_codes(number), size * stock.code_size).reshape(size, -1)
        vectors[rows] = said(codes, layout, words, stock.d)
        if layout.parts and stock.by_residual:
            vectors[rows] += centroids[number]
    return np.asarray(vectors @ rotation)


def said(codes: np.ndarray, layout: Any, words: np.ndarray | None, dimension: int) -> np.ndarray:
    if words is None:
        return np.ascontiguousarray(codes).view(np.float32).reshape(-1, dimension)
    if layout.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
    each = np.stack([words[m][codes[:, m]] for m in range(layout.parts)])
    return np.concatenate(list(each), axis=1) if layout.product else each.sum(axis=0)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("residual", [True, False])
def test_stock_faiss_gives_the_scores_of_decoded_documents(
    factory: str, residual: bool, build: Build, world: World
) -> None:
    """`faiss.read_index` alone: every score equals the inner product with what codes, lists and rotation stand for."""
    if not residual and not (factory.count("IVF") and factory.count("Q")):
        pytest.skip("without lists there is no residual")
    search = {"nprobe": 4} if "IVF" in factory else {}
    index = build(factory, residual=residual, search=search)
    stock = faiss.read_index(str(index.path / "index.faiss"))
    if "IVF" in factory:
        faiss.extract_index_ivf(stock).nprobe = 4
    expected = world.unseen @ decoded(index).T
    scores, rows = stock.search(world.unseen, 20)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), atol=1e-5)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :20], atol=1e-5)
    ours, _ = index.search(world.unseen, 20)
    np.testing.assert_allclose(ours, scores, atol=1e-6)
    assert index.problems() == []
    assert index.manifest.details["overlap_after"] >= index.manifest.details["overlap_before"]


@pytest.mark.parametrize("factory", ["PQ4x4fs", "OPQ4,IVF4,PQ4x4fs"])
def test_fast_scan_has_the_codes_of_plain_4_bit_codes(factory: str, build: Build, world: World) -> None:
    """Its scores differ from those of decoded documents by the rounding of its tables to 8 bits alone."""
    search = {"nprobe": 4} if "IVF" in factory else {}
    built = faiss.read_index(str(build(factory, search=search).path / "index.faiss"))
    plain = build(factory.removesuffix("fs"), "plain", search=search)
    fast = fast_scan(faiss.read_index(str(plain.path / "index.faiss")), layout_of(factory))
    for index in (built, fast):
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
        assert isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan)
    if "IVF" in factory:
        faiss.extract_index_ivf(fast).nprobe = 4
    found, rows = fast.search(world.unseen, 10)
    expected = world.unseen @ decoded(plain).T
    np.testing.assert_allclose(found, np.take_along_axis(expected, rows, axis=1), atol=0.02)


@pytest.mark.parametrize(
    ("factory", "keys", "gain"),
    [
        ("OPQ4,IVF4,PQ4x4", {"temperature": 0.2, "selection": "straight-through"}, 0.025),
        ("RQ4x4", GENTLE, 0.02),
        ("OPQ4,PQ4x4", {**GENTLE, "temperature": 0.05, "selection": "straight-through"}, 0.003),
    ],
)
def test_training_beats_faiss_on_unseen_queries(
    factory: str, keys: dict[str, Any], gain: float, build: Build, world: World
) -> None:
    """The same bytes find more of the exact best ten, for queries that were neither trained on nor held out."""
    search = {"nprobe": 2} if "IVF" in factory else {}
    index = build(factory, search=search, training={"epochs": 8, **keys})
    start = build(factory, "start", search=search, training={"epochs": 0, "refinement": 0, "learning_rate": 1.0})
    assert start.manifest.details["overlap_before"] == index.manifest.details["overlap_before"]
    assert index.manifest.details["shipped"] == "distilled"
    before, after = (
        overlap(each.search(world.unseen, 10)[1], world.unseen, world.documents) for each in (start, index)
    )
    assert after > before + gain
    assert (index.path / "index.faiss").stat().st_size == (start.path / "index.faiss").stat().st_size


@pytest.mark.parametrize("factory", ["OPQ4,IVF4,PQ4x4", "IVF4,RQ4x8"])
def test_codes_in_any_lists_decode_to_their_scores(factory: str, world: World, tmp_path: Path) -> None:
    """Documents stay in lists that are not the nearest (``fixed``): codes are of what is left in their own list."""
    layout = layout_of(factory)
    template = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    template.train(world.documents)
    book = Codebooks.of(template, layout, residual=True)
    lists = np.random.default_rng(0).integers(0, 4, 400)
    rotated = book.rotated(world.documents)
    codes = book.encode(rotated, lists)
    halves = [(lists[:250], codes[:250]), (lists[250:], codes[250:])]
    faiss.write_index(filled(template, layout, book, halves), str(tmp_path / "any.faiss"))
    stock = faiss.read_index(str(tmp_path / "any.faiss"))
    faiss.extract_index_ivf(stock).nprobe = 4
    scores, rows = stock.search(world.unseen, 400)
    assert (np.sort(rows, axis=1) == np.arange(400)).all()
    whole = book.base(lists) + book.decoded(codes)
    expected = np.take_along_axis(book.rotated(world.unseen) @ whole.T, rows, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.square(rotated - whole).sum(axis=1).mean() < np.square(rotated - book.base(lists)).sum(axis=1).mean()


def test_the_teachers_best_are_those_of_brute_force_without_the_document_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "BATCH", 150)
    documents = Documents(world.documents, cosine=False)
    scores = world.documents @ world.documents.T
    with_own = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    found = pseudo_queries(documents, 400, 20, 0, own_document=True)
    np.testing.assert_array_equal(found.top, with_own)
    np.fill_diagonal(scores, -np.inf)
    without = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    found = pseudo_queries(documents, 400, 20, 0, own_document=False)
    np.testing.assert_array_equal(found.top, without)
    np.testing.assert_array_equal(found.own, np.arange(400))


def test_a_repeated_query_is_never_both_held_out_and_trained_on() -> None:
    """A log has some queries many times: all of a held-out one go, and it is measured once."""
    vectors = np.repeat(np.arange(60, dtype=np.float32), np.arange(60) % 4 + 1)[:, None]
    vectors = np.random.default_rng(0).permutation(vectors)
    rows = np.arange(len(vectors))
    pupils = Pupils(vectors, np.full(len(rows), -1), rows[:, None].astype(np.int32))
    train, held = split(pupils, 0.25, seed=1)
    assert len(held) == len(set(held.vectors[:, 0])) == 20  # at least 50, but at most a third of 60
    assert not set(held.vectors[:, 0]) & set(train.vectors[:, 0])
    kept = ~np.isin(vectors[:, 0], held.vectors[:, 0])
    np.testing.assert_array_equal(train.top[:, 0], rows[kept])
    with pytest.raises(InputError, match="all 3 queries that teach have the same vector"):
        split(pupils.part(np.flatnonzero(vectors[:, 0] == 2)), 0.1, seed=1)


def test_ships_faiss_own_index_when_nothing_was_gained(
    build: Build, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate that destroys the codebooks: what FAISS built is kept, bit for bit, and it is said."""
    with caplog.at_level(logging.WARNING, logger="retrieval_kd"):
        index = build("PQ4x8", training={"learning_rate": 100.0})
    details = index.manifest.details
    assert (details["shipped"], details["shipped_epoch"]) == ("faiss", None)
    assert details["overlap_after"] == details["overlap_before"]
    assert "training gained nothing on 50 held-out queries: FAISS's own index is kept" in caplog.text
    recipe = DistillVQRecipe(kind="distill-vq", factory="PQ4x8")
    plain = faiss.index_factory(16, "PQ4x8", faiss.METRIC_INNER_PRODUCT)
    plain.do_polysemous_training = False
    plain.pq.cp.seed, plain.pq.cp.min_points_per_centroid = recipe.seed, 1
    plain.train(world.documents)
    plain.add(world.documents)
    assert faiss.serialize_index(plain).tobytes() == (index.path / "index.faiss").read_bytes()


def test_learns_of_documents_themselves_without_queries(build: Build, world: World) -> None:
    index = build("OPQ4,PQ4x4", queries=False, training={"epochs": 8})
    details = index.manifest.details
    assert index.manifest.counts["training_queries"] + index.manifest.counts["held_out_queries"] == 400
    assert details["overlap_after"] > details["overlap_before"]
    assert "queries" not in index.manifest.inputs


def a_lesson(world: World, batch: int = 8) -> Lesson:
    """The first queries against the first 60 documents."""
    shape = (batch, 60)
    drawn = np.argsort(-(world.queries[:batch] @ world.documents[:60].T), axis=1)[:, :12]
    nothing = np.zeros(shape, np.float32)
    return Lesson(world.queries[:batch], np.arange(60), np.ones(shape, bool), drawn, nothing, nothing > 0)


@pytest.mark.parametrize("loss", ["listnet", "kl", "reverse-kl", "margin-mse", "ranknet", "mse"])
@pytest.mark.parametrize("product", [True, False])
def test_every_loss_is_lowered_by_its_steps(loss: str, product: bool, world: World) -> None:
    rng = np.random.default_rng(1)
    words = 0.1 * rng.standard_normal((4, 16, 4 if product else 16)).astype(np.float32)
    keys = Training(loss=loss, temperature=0.2, learning_rate=0.005)
    learner = LearnedCodebooks(Codebooks(words, None, None, product=product), 16, keys)
    documents = Documents(world.documents, cosine=False)
    lessons = Lessons(learner, keys, documents, np.zeros(400, np.int32))
    codes = rng.integers(0, 16, (400, 4)).astype(np.uint8)
    losses = list(lessons.epoch([a_lesson(world)] * 40, codes, 0.1, 0.001))
    assert losses[-1] < 0.97 * losses[0]


def test_listnet_is_the_cross_entropy_of_both_softmaxes(world: World) -> None:
    """By hand, without what is masked."""
    student = torch.tensor([[0.2, 0.1, 5.0]])
    teacher = torch.tensor([[0.3, 0.1, 9.0]])
    mask = torch.tensor([[True, True, False]])
    loss = relevance_loss(student, teacher, mask, Training(temperature=0.1), 0.1)
    target = 1 / (1 + np.exp(-2.0))
    ours = 1 / (1 + np.exp(-1.0))
    assert float(loss) == pytest.approx(-target * np.log(ours) - (1 - target) * np.log(1 - ours), rel=1e-5)


def test_straight_through_selection_has_the_gradient_of_the_papers_formula(world: World) -> None:
    """Hard codewords forward; backward the sum over ``hard - sg(p) + p`` with p = softmax(-distance^2), as in 2.2."""
    words = np.random.default_rng(2).standard_normal((4, 16, 4)).astype(np.float32)
    keys = Training(selection="straight-through")
    learner = LearnedCodebooks(Codebooks(words, None, None), 16, keys)
    x = torch.from_numpy(world.documents[:9])
    direction = torch.from_numpy(world.queries[:9])
    said, centroid = learner(x, torch.zeros(9, dtype=torch.int64), None)
    assert centroid is None
    (said * direction).sum().backward()
    found = learner.words.grad
    book = torch.from_numpy(words.copy()).requires_grad_()
    distances = (x.view(9, 4, 1, 4) - book).square().sum(-1)
    soft = torch.softmax(-distances, dim=2)
    hard = torch.nn.functional.one_hot(distances.argmin(dim=2), 16).float()
    expected = torch.einsum("nmk,mkd->nmd", hard - soft.detach() + soft, book).flatten(1)
    (expected * direction).sum().backward()
    torch.testing.assert_close(said, expected)
    torch.testing.assert_close(found, book.grad, rtol=1e-4, atol=1e-6)


def test_centroids_learn_by_scores_of_their_own(world: World) -> None:
    """Codes of whole documents say nothing of centroids: the loss of these is as heavy as that of codes at first."""
    rng = np.random.default_rng(3)
    words = 0.1 * rng.standard_normal((4, 16, 4)).astype(np.float32)
    centroids = world.documents[:4].copy()
    lists = rng.integers(0, 4, 400).astype(np.int32)
    codes = rng.integers(0, 16, (400, 4)).astype(np.uint8)
    lesson = a_lesson(world)
    for weight in (0.0, "auto"):
        keys = Training(temperature=0.2, centroid_weight=weight, centroid_learning_rate=0.01)
        learner = LearnedCodebooks(Codebooks(words, centroids, None, residual=False), 16, keys)
        course = Lessons(learner, keys, Documents(world.documents, cosine=False), lists)
        loss = next(iter(course.epoch([lesson], codes, 0.1, 0.001)))
        assert learner.centroids is not None
        moved = np.abs(learner.centroids.detach().numpy() - centroids).max()
        if weight == 0.0:
            of_codes = loss
            assert moved == 0
            continue
        assert 0.005 < moved < 0.011  # Adam's first step is its learning rate
        asked = torch.from_numpy(lesson.queries)
        student, teacher = (asked @ torch.from_numpy(x).T for x in (centroids[lists[:60]], world.documents[:60]))
        of_centroids = float(relevance_loss(student, teacher, torch.from_numpy(lesson.mask), keys, 0.2))
        assert course.centroid_weight == pytest.approx(of_codes / (of_centroids + 1e-6), rel=1e-4)
        assert loss == pytest.approx(2 * of_codes, rel=1e-4)


def test_refined_codewords_are_the_means_of_what_is_left_to_them() -> None:
    """Two codebooks of numbers, by hand; and a codeword that no document has stays."""
    documents = np.array([[0], [1], [10], [12]], dtype=np.float32)
    words = np.array([[[0], [9], [99]]], dtype=np.float32)
    nothing = np.zeros(4, np.int64)
    refined = Codebooks(words, None, None, product=False).refined(documents, nothing, 1)
    np.testing.assert_allclose(refined.words, [[[0.5], [11], [99]]])
    two = np.concatenate([words[:, :2], [[[-1], [1]]]]).astype(np.float32)
    # codes: 0-1, 0+1, 9+1, 9+1; the first become the means of (1, 0) and (9, 11), the second of -0.5 and of 0.5, 0, 2
    refined = Codebooks(two, None, None, product=False).refined(documents, nothing, 1)
    np.testing.assert_allclose(refined.words[0], [[0.5], [10]])
    np.testing.assert_allclose(refined.words[1], [[-0.5], [2.5 / 3]], rtol=1e-6)


def test_codes_that_are_added_go_on_from_those_of_the_epoch_before(
    build: Build, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from any codes on, each is chosen again given all others: the error only falls."""
    encode, former = Codebooks.encode, []

    def seen(self: Codebooks, rotated: Any, lists: Any, codes: Any = None) -> np.ndarray:
        found = encode(self, rotated, lists, codes)
        former.append((codes, found))
        return found

    monkeypatch.setattr(Codebooks, "encode", seen)
    build("RQ4x4", training={"epochs": 3, "refinement": 0})
    assert [codes is None for codes, _ in former] == [True, False, False, False]
    for (_, before), (given, _) in pairwise(former):
        np.testing.assert_array_equal(given, before)
    rng = np.random.default_rng(4)
    book = Codebooks(0.3 * rng.standard_normal((4, 16, 16)).astype(np.float32), None, None, product=False)
    codes, nothing = rng.integers(0, 16, (400, 4)).astype(np.uint8), np.zeros(400, np.int64)
    errors = []
    for _ in range(3):
        errors.append(np.square(world.documents - book.decoded(codes)).sum(axis=1))
        codes = encode(book, world.documents, nothing, codes)
    assert (errors[1] <= errors[0] + 1e-5).all() and (errors[2] <= errors[1] + 1e-5).all()
    assert errors[1].mean() < 0.7 * errors[0].mean()


def test_a_learned_rotation_stays_orthogonal(build: Build) -> None:
    keys = {"learning_rate": 0.003, "reconstruction": 1.0, "rotation_learning_rate": 0.001, "query_learning_rate": 0.0}
    index = build("OPQ4,PQ4x4", training=keys)
    assert index.manifest.details["shipped_epoch"] in (1, 2)
    stock = faiss.read_index(str(index.path / "index.faiss"))
    matrix = faiss.vector_to_array(faiss.downcast_VectorTransform(stock.chain.at(0)).A).reshape(16, 16)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(16), atol=1e-5)
    plain = build("OPQ4,PQ4x4", "plain", training={"epochs": 0})
    other = faiss.read_index(str(plain.path / "index.faiss"))
    assert not np.allclose(matrix.ravel(), faiss.vector_to_array(faiss.downcast_VectorTransform(other.chain.at(0)).A))


@pytest.mark.parametrize("factory", ["OPQ4,PQ4x4", "RQ4x4"])
def test_a_map_of_queries_lives_in_the_stock_index_and_documents_grow_without_it(
    factory: str, build: Build, embed: Embed, world: World, tmp_path: Path
) -> None:
    """Documents are coded by their own rotation: the same documents again get the same codes."""
    index = build(factory, training={**GENTLE, "query_learning_rate": 0.003})
    assert index.manifest.details["shipped_epoch"] not in (None, 0)
    grown = grow(index, vectors_of(embed, world.documents, "documents"), tmp_path / "grown")
    expected = world.unseen @ decoded(index).T
    scores, rows = faiss.read_index(str(index.path / "index.faiss")).search(world.unseen, 10)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, axis=1), atol=1e-5)
    if factory.startswith("OPQ"):
        assert (index.path / "document_rotation.npy").is_file()
        assert (grown / "index.faiss").read_bytes() == (index.path / "index.faiss").read_bytes()
    else:
        again, _ = faiss.read_index(str(grown / "index.faiss")).search(world.unseen, 10)
        assert abs(again - scores).mean() < 0.05


@pytest.mark.parametrize("factory", ["OPQ4,IVF4,PQ4x4", "PQ4x4fs", "IVF4,Flat", "IVF4,RQ4x4"])
def test_grow_codes_new_documents_with_what_was_learned(
    factory: str, build: Build, embed: Embed, world: World, tmp_path: Path
) -> None:
    """Codebooks, centroids and rotation are those of the index; the codes are the nearest."""
    search = {"nprobe": 4} if "IVF" in factory else {}
    index = build(factory, search=search)
    more = make_world(150, seed=3).documents
    grown = grow(index, embed(more, name="more"), tmp_path / "grown")
    layout = layout_of(factory)
    books = [
        Codebooks.of(faiss.read_index(str(path / "index.faiss")), layout, residual=True) for path in (index.path, grown)
    ]
    for name in ("words", "centroids", "rotation"):
        one, other = getattr(books[0], name), getattr(books[1], name)
        assert (one is None and other is None) or np.array_equal(one, other)
    stock = faiss.read_index(str(grown / "index.faiss"))
    assert stock.ntotal == 150
    if "IVF" in factory:
        faiss.extract_index_ivf(stock).nprobe = 4
    _, rows = stock.search(world.unseen, 10)
    random = 10 / 150
    assert overlap(rows, world.unseen, more) > 4 * random


def test_grow_takes_one_document_and_no_nan(build: Build, embed: Embed, world: World, tmp_path: Path) -> None:
    index = build("OPQ4,PQ4x4", training={"epochs": 0})
    one = faiss.read_index(
        str(grow(index, embed(world.documents[7:8], name="one"), tmp_path / "grown") / "index.faiss")
    )
    scores, _ = one.search(world.unseen, 1)
    np.testing.assert_allclose(scores[:, 0], world.unseen @ decoded(index)[7], atol=1e-5)
    with pytest.raises(InputError, match="1 vectors have NaN or infinite values; encode again"):
        grow(index, embed(np.full((1, 16), np.nan, np.float32), name="nan"), tmp_path / "bad")


def grow(index: Index, vectors: Vectors, folder: Path) -> Path:
    folder.mkdir()
    index.grow(Source(vectors=vectors), Draft(folder, resumed=False))
    return folder


class KilledError(Exception):
    """What stands for a killed process."""


@pytest.mark.parametrize("factory", ["OPQ4,IVF4,PQ4x4", "RQ4x4"])
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    factory: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(factory, "whole", training={"epochs": 4})
    evaluate = distillation.Course._evaluate
    seen = []

    def killed(self: Any, book: Any, lists: Any, epoch: int, **values: float) -> None:
        seen.append(epoch)
        if epoch == 3:
            raise KilledError
        evaluate(self, book, lists, epoch, **values)

    monkeypatch.setattr(distillation.Course, "_evaluate", killed)
    with pytest.raises(KilledError):
        build(factory, "resumed", training={"epochs": 4})
    monkeypatch.setattr(distillation.Course, "_evaluate", evaluate)
    seen.clear()
    resumed = build(factory, "resumed", training={"epochs": 4})
    assert resumed.manifest.details["history"] == whole.manifest.details["history"]
    assert resumed.manifest.files == whole.manifest.files
    assert not (resumed.path / "work").exists()


def test_score_files_teach(build: Build, world: World, tmp_path: Path) -> None:
    """A teacher that does not see four of the dimensions: with weight 1 its order is learned, and measured."""
    rows = []
    for place, query in enumerate(world.queries * (np.arange(16) >= 4)):
        scores = world.documents @ query
        best = np.argsort(-scores)[:60].tolist()
        rows.append((f"d{place}", [f"d{row}" for row in best], scores[best].tolist()))
    teacher = scores_artifact(tmp_path / "teacher", rows, InputRef("c" * 64))
    keys = {"score_temperature": 0.05, "epochs": 6}
    index = build("PQ4x4", scores=[teacher.path], training={**keys, "score_weight": 1.0})
    details = index.manifest.details
    assert details["overlap_after"] > details["overlap_before"] + 0.05
    assert index.manifest.inputs["scores"]["fingerprint"] == teacher.fingerprint
    alone = build("PQ4x4", "alone", training={"epochs": 0}).manifest.details["overlap_before"]
    mixed = build("PQ4x4", "mixed", scores=[teacher.path], training={"score_weight": 0.25, "epochs": 0})
    measured = 0.75 * alone + 0.25 * details["overlap_before"]
    assert mixed.manifest.details["overlap_before"] == pytest.approx(measured)


def scores_artifact(path: Path, rows: Any, collection: InputRef) -> Scores:
    made = make_scores(path.with_name("made"), rows, per_shard=1000)
    from retrieval_kd.plan import Plan

    with Plan("scores", made.manifest.recipe, {"collection": collection}).write(path) as draft:
        for shard in made.shards:
            (draft.path / shard.name).write_bytes(shard.read_bytes())
        draft.counts.update(made.manifest.counts)
        draft.details.update(made.manifest.details)
    return Scores.load(path)


def test_score_files_of_other_queries_or_documents_are_refused(build: Build, tmp_path: Path) -> None:
    collection = InputRef("c" * 64)
    others = scores_artifact(tmp_path / "others", [("x1", ["d1", "d2"], [1.0, 2.0])], collection)
    with pytest.raises(ArtifactError, match="scores none of the 300 queries; score the same split"):
        build("PQ4x4", scores=[others.path])


def test_unknown_documents_in_a_score_file_are_refused(build: Build, tmp_path: Path) -> None:
    unknown = scores_artifact(tmp_path / "unknown", [("d1", ["d1", "gone"], [1.0, 2.0])], InputRef("c" * 64))
    with pytest.raises(ArtifactError, match=r"scores 1 documents that have no vector \(first: 'gone'\)"):
        build("PQ4x4", scores=[unknown.path])


def test_scores_without_queries_are_refused(build: Build, tmp_path: Path) -> None:
    teacher = scores_artifact(tmp_path / "teacher", [("d1", ["d1", "d2"], [1.0, 2.0])], InputRef("c" * 64))
    with pytest.raises(UsageError, match="give the vectors of these queries too"):
        build("PQ4x4", queries=False, scores=[teacher.path])


@pytest.mark.parametrize(
    "factory", ["Flat", "HNSW32", "SQ8", "PQ4x6", "RQ4x4fs", "OPQ4,", "IVF4", "PQ3x4", "PQ4x4,RFlat"]
)
def test_factories_without_codebooks_are_refused(factory: str, build: Build) -> None:
    with pytest.raises(RecipeError, match="factory"):
        build(factory)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training": {"rotation_learning_rate": 0.1}}, "has no rotation to learn; put OPQ in front"),
        ({"training": {"loss": "listnett"}}, "loss"),
        ({"rerank": {"store": "int8"}}, "has no rerank"),
        ({"training": {"pseudo_queries": 0}}, "learns from queries"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(keys: dict[str, Any], message: str, build: Build) -> None:
    with pytest.raises((RecipeError, UsageError), match=message):
        build("PQ4x4", queries=False, **keys)


def test_queries_that_are_no_numbers_are_refused(embed: Embed, world: World, tmp_path: Path) -> None:
    queries = world.queries.copy()
    queries[7, 3] = np.nan
    asked = embed(queries, name="bad", of="queries", split="train")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kind: distill-vq\nfactory: PQ4x4\n")
    with pytest.raises(InputError, match=r"1 query vectors have NaN or infinite values \(queries 'd7'\)"):
        build_index(recipe, vectors=embed(world.documents), queries=asked, out=tmp_path / "index")


def test_zero_vectors_are_said_where_cosine_compares(
    embed: Embed, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = world.documents.copy()
    matrix[[3, 9]] = 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kind: distill-vq\nfactory: PQ4x4\ntraining: {epochs: 0}\n")
    index = build_index(recipe, vectors=embed(matrix, similarity="cosine"), out=tmp_path / "index")
    assert index.manifest.details["zero_vectors"] == 2
    assert "2 of 400 vectors are zero and have no direction" in caplog.text


def test_codewords_as_many_as_documents_are_said(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    build("RQ4x4", "few", training={"epochs": 0})
    assert "as codewords" not in caplog.text
    build("RQ2x8", "many", training={"epochs": 0})
    assert "factory 'RQ2x8' keeps 512 whole vectors as codewords for 400 documents" in caplog.text


def test_without_a_gpu_it_trains_on_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distillation._device("auto") == distillation._device("cpu") == "cpu"
    assert not caplog.records
    assert distillation._device("cuda:1") == "cpu"
    assert "device cuda:1: torch sees no GPU and trains on the CPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distillation._device(name) for name in ("auto", "all", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(UsageError, match="torch sees 2 GPUs, cuda:0 to cuda:1"):
        distillation._device("cuda:2")


def test_one_document_is_refused(embed: Embed, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("kind: distill-vq\nfactory: PQ4x4\n")
    with pytest.raises(InputError, match="1 vectors; at least 2 are needed"):
        build_index(recipe, vectors=embed(np.ones((1, 16), np.float32)), out=tmp_path / "index")


@pytest.mark.parametrize("factory", ["OPQ4,PQ4x4", "IVF4,RQ4x8", "PQ4x4fs"])
def test_estimate_is_the_size_of_the_file(factory: str, build: Build, embed: Embed, world: World) -> None:
    index = build(factory, training={"epochs": 0})
    recipe = DistillVQRecipe(kind="distill-vq", factory=factory)
    each, besides = DistillVQIndex.estimate(recipe, Shape(16))
    size = (index.path / "index.faiss").stat().st_size
    assert each * 400 + besides == pytest.approx(size, abs=1500)
