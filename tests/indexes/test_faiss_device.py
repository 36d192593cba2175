"""Where FAISS works: decided with pretended GPUs (a copy on the CPU stands for each), and with real ones (`gpu`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import yaml

from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import RecipeError, UsageError
from retrieval_kd.indexes import faiss_device as device
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index

Embed = Callable[..., Vectors]


def random_matrix(number: int, dimension: int = 16, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, dimension)).astype(np.float32)


def build(folder: Path, vectors: Vectors, factory: str, **keys: Any) -> Index:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"kind": "faiss", "factory": factory, "threads": 1, **keys}))
    return build_index(recipe, vectors=vectors, out=folder / "index")


class Gpus:
    """What FAISS's GPU functions were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, *, fails: bool = False) -> None:
        self.calls: list[tuple[list[int], bool, bool]] = []
        self.searches: list[int] = []
        self._fails = fails

        class Options:
            useFloat16 = False  # noqa: N815 - FAISS's name
            shard = False

        pretended = {
            "get_num_gpus": lambda: number,
            "StandardGpuResources": object,
            "GpuMultipleClonerOptions": Options,
            "index_cpu_to_gpu": lambda _, gpu, index, options: self._copy([gpu], index, options),
            "index_cpu_to_gpu_multiple_py": lambda _, index, options, gpus: self._copy(gpus, index, options),
            "index_gpu_to_cpu": lambda index: faiss.clone_index(index.index),
        }
        for name, value in pretended.items():
            monkeypatch.setattr(faiss, name, value, raising=False)

    def _copy(self, gpus: list[int], index: Any, options: Any) -> Any:
        if self._fails:
            raise RuntimeError("Error in x at /a.cpp:1: Error: this index has no GPU implementation")
        self.calls.append((gpus, options.shard, options.useFloat16))
        return _Copy(faiss.clone_index(index), self.searches)


class _Copy:
    def __init__(self, index: Any, searches: list[int]) -> None:
        self.index, self._searches = index, searches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def search(self, queries: np.ndarray, k: int) -> Any:
        self._searches.append(k)
        return self.index.search(queries, k)


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("cpu", 2, ()),
        ("auto", 2, (0,)),
        ("auto", 0, ()),
        ("cuda:1", 2, (1,)),
        ("all", 3, (0, 1, 2)),
        ("all", 0, ()),
        ("cuda:5", 0, ()),
    ],
)
def test_which_gpus(name: str, number: int, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: number)
    assert device.placement(name).gpus == expected
    if expected:
        assert device.placement(name, "sharded") == device.Placement(expected, "sharded")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    with pytest.raises(UsageError, match="device cuda:2: FAISS sees 2 GPUs, cuda:0 to cuda:1"):
        device.placement("cuda:2")


def test_without_a_gpu_the_same_recipe_runs_on_the_cpu_and_says_so_once(
    tmp_path: Path, embed: Embed, caplog: pytest.LogCaptureFixture
) -> None:
    device._say_that_there_is_no_gpu.cache_clear()
    matrix = random_matrix(60)
    index = build(tmp_path, embed(matrix), "Flat", device="cuda:0", search={"device": "cuda:0"})
    with caplog.at_level(logging.WARNING, "retrieval_kd"):
        Index.load(tmp_path / "index")
    said = [r.message for r in caplog.records if "sees no GPU" in r.message]
    assert len(said) == 1 and said[0].startswith("device cuda:0: FAISS sees no GPU and works on the CPU")
    best = np.argmax(random_matrix(4, seed=1) @ matrix.T, axis=1)
    assert index.search(random_matrix(4, seed=1), 1)[1][:, 0].tolist() == best.tolist()
    with pytest.raises(RecipeError, match="device"):
        Index.load(tmp_path / "index", search={"device": "gpu"})


def test_a_build_on_a_gpu_is_saved_as_a_cpu_index(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(monkeypatch, 2)
    index = build(tmp_path, embed(random_matrix(200)), "IVF4,Flat", device="cuda:1", search={"nprobe": 4})
    assert gpus.calls == [([1], False, False)]
    assert isinstance(faiss.read_index(str(index.path / "index.faiss")), faiss.IndexIVFFlat)
    assert len(index) == 200 and index.problems() == []


def test_a_search_on_gpus_leaves_filters_and_many_hits_to_the_cpu(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, queries = random_matrix(3000), random_matrix(3, seed=1)
    plain = build(tmp_path, embed(matrix), "PQ8x4,RFlat", search={"k_factor": 4})
    gpus = Gpus(monkeypatch, 3)
    index = Index.load(tmp_path / "index", search={"device": "all", "shard": "sharded"})
    assert gpus.calls == [([0, 1, 2], True, False)]
    np.testing.assert_array_equal(index.search(queries, 10)[1], plain.search(queries, 10)[1])
    assert gpus.searches == [11]
    index.search(queries, 10, np.arange(3000) < 1500)
    index.search(queries, device.MOST_GPU_HITS)
    assert gpus.searches == [11]


def test_float16_is_used_where_the_hits_are_scored_again(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, embed(random_matrix(300)), "PQ8x4", rerank={"store": "int8"})
    gpus = Gpus(monkeypatch, 2)
    Index.load(tmp_path / "index", search={"device": "all"})
    assert gpus.calls == [([0, 1], False, True)]


def test_an_index_that_gpus_cannot_hold_stays_on_the_cpu(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = build(tmp_path, embed(random_matrix(300)), "PQ8x4")
    Gpus(monkeypatch, 1, fails=True)
    index = Index.load(tmp_path / "index", search={"device": "auto"})
    assert "FAISS keeps this index on the CPU: this index has no GPU implementation" in caplog.text
    queries = random_matrix(3, seed=1)
    np.testing.assert_array_equal(index.search(queries, 5)[1], plain.search(queries, 5)[1])


@pytest.mark.parametrize(
    ("factory", "options", "links"),
    [
        ("HNSW16", "GPU NVIDIA_CUVS", 16),
        ("HNSW,Flat", "NVIDIA_CUVS", 32),
        ("HNSW16", "GPU", None),
        ("SQ8", "CUVS", None),
    ],
)
def test_cagra_builds_graphs_where_cuvs_is(
    factory: str, options: str, links: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Config:
        device = graph_degree = intermediate_graph_degree = 0

    def graph(resources: object, dimension: int, metric: int, config: Config) -> Any:
        made.append((dimension, metric, config.device, config.graph_degree, config.intermediate_graph_degree))
        return object()

    Gpus(monkeypatch, 2)
    monkeypatch.setattr(faiss, "get_compile_options", lambda: options)
    monkeypatch.setattr(faiss, "GpuIndexCagraConfig", Config, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexCagra", graph, raising=False)
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    built = device.builder(index, factory, device.Placement((1,)))
    assert isinstance(built, device.CagraGraph) == (links is not None)
    if links is not None:
        assert made == [(16, faiss.METRIC_INNER_PRODUCT, 1, 2 * links, 4 * links)]
    assert device.builder(index, factory, device.Placement()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,PQ8", "HNSW16"])
def test_a_real_gpu_gives_the_same_hits(factory: str, tmp_path: Path, embed: Embed) -> None:
    matrix, queries = random_matrix(2000, 32), random_matrix(20, 32, seed=1)
    search = {"nprobe": 16} if "IVF" in factory else {}
    index = build(tmp_path, embed(matrix), factory, device="cuda:0", search=search)
    on_gpu = Index.load(tmp_path / "index", search={"device": "cuda:0"})
    pairs = zip(index.search(queries, 10)[1].tolist(), on_gpu.search(queries, 10)[1].tolist(), strict=True)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) >= 0.99
