from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from retrieval_kd.artifact import MANIFEST, Manifest
from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import RecipeError, UsageError
from retrieval_kd.models.encoder import DenseEncoder
from retrieval_kd.pipeline import demo, estimate_pipeline, run_pipeline


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """The tiny collection's source, a tiny model, and recipes of a teacher and a student."""
    tiny.make_tiny_collection(tmp_path)
    model = str(tiny.make_dense(tmp_path / "dense"))
    student = {"kind": "dense", "base": model, "losses": [{"kind": "kl"}], "steps": 0, "split": "dev"}
    return {
        "source": str(tmp_path / "tiny-beir"),
        "model": model,
        "teacher": tiny.write_recipe(tmp_path / "teacher.yaml", {"kind": "bi-encoder", "model": model}),
        "student": tiny.write_recipe(tmp_path / "student.yaml", student),
    }


def pipeline(folder: Path, steps: dict[str, Any], **variables: Any) -> str:
    values = {"kind": "pipeline", "variables": variables, "steps": steps}
    return tiny.write_recipe(folder / "pipeline.yaml", values)


def manifests(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.rglob(MANIFEST)}


def test_steps_name_one_another_and_are_reused(world: dict[str, str], tmp_path: Path) -> None:
    steps = {
        "collection": {"data": world["source"], "sample": "$sample"},
        "scores": {
            "score": world["teacher"],
            "collection": "$collection",
            "candidates": ["qrels:dev"],
            "set": {"similarity": "$similarity", "depth": "$depth"},
        },
        "student": {"train": world["student"], "collection": "$collection", "scores": ["$scores"]},
        "vectors": {"encode": "$student", "collection": "$collection", "queries": "test"},
    }
    name = pipeline(tmp_path, steps, sample=None, similarity="cosine", depth=None)
    out = tmp_path / "run"
    paths = run_pipeline(name, out)
    assert paths == {step: out / step for step in steps}
    read = {step: Manifest.read(path) for step, path in paths.items()}
    kinds = {step: manifest.artifact for step, manifest in read.items()}
    assert kinds == {"collection": "collection", "scores": "scores", "student": "model", "vectors": "vectors"}
    assert (read["scores"].recipe["similarity"], read["scores"].recipe["depth"]) == ("cosine", None)
    assert read["student"].inputs["scores"]["fingerprint"] == read["scores"].fingerprint
    assert read["vectors"].inputs["model"]["fingerprint"] == DenseEncoder.load(paths["student"]).ref().fingerprint
    before = manifests(out)
    assert len(before) == 4
    run_pipeline(name, out)
    assert manifests(out) == before
    other = run_pipeline(name, tmp_path / "other", ["variables.similarity=dot", "variables.sample=10"])
    assert Manifest.read(other["scores"]).recipe["similarity"] == "dot"
    assert len(Collection.load(other["collection"]).documents) == 10


def test_unfinished_run_goes_on(world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {
        "collection": {"data": world["source"]},
        "vectors": {"encode": "$model", "collection": "$collection"},
    }
    name, out = pipeline(tmp_path, steps, model=world["model"]), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(DenseEncoder, "encode", interrupted)
        run_pipeline(name, out)
    before = manifests(out)
    assert set(before) == {"collection"}
    run_pipeline(name, out)
    after = manifests(out)
    assert set(after) == {"collection", "vectors"} and after["collection"] == before["collection"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"encode": "$modell", "collection": "$collection"}, r"'\$modell' is no variable or earlier step .*'model'"),
        ({"encode": "$model", "collection": "$later"}, r"step 'broken': '\$later' is no variable or earlier step"),
        ({"encode": "$model", "colection": "$collection"}, r"unknown argument 'colection' \(did you mean 'collection'"),
        ({"encode": "$model"}, "step 'broken': argument 'collection' is missing"),
        ({"encod": "$model", "collection": "$collection"}, "step 'broken' has no verb .*encode"),
        ({"encode": "$model", "collection": "$collection", "out": "x"}, "unknown argument 'out'"),
        ({"encode": "$model", "collection": "$collection", "set": {"a": 1}}, "unknown argument 'overrides'"),
        ({"train": "$model", "encode": "x", "collection": "$collection"}, "unknown argument"),
    ],
)
def test_steps_that_cannot_be(step: dict[str, Any], message: str, tmp_path: Path) -> None:
    """All of them are found before the first step runs."""
    steps = {"collection": {"data": "nowhere"}, "broken": step, "later": {"data": "nowhere"}}
    with pytest.raises(RecipeError, match=message):
        run_pipeline(pipeline(tmp_path, steps, model="builtin"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_variables_that_cannot_be(tmp_path: Path) -> None:
    steps = {"collection": {"data": "nowhere", "sample": "$sample"}}
    name = pipeline(tmp_path, steps, sample=3)
    with pytest.raises(RecipeError, match=r"no step uses variable 'smaple' \(did you mean 'sample'\?\)"):
        run_pipeline(name, tmp_path / "run", ["variables.smaple=5"])
    with pytest.raises(RecipeError, match="'collection' is both a variable and a step"):
        run_pipeline(name, tmp_path / "run", ["variables.collection=5"])
    with pytest.raises(RecipeError, match=r"unknown key 'step' \(did you mean 'steps'\?\)"):
        run_pipeline(name, tmp_path / "run", ["step=5"])
    with pytest.raises(RecipeError, match=r"no recipe of that name in pipelines/ \(did you mean 'demo'\?\)"):
        run_pipeline("demmo", tmp_path / "run")


def test_estimate(tmp_path: Path) -> None:
    steps = {
        "c": {"data": "pydocs", "sample": "$sample"},
        "v": {"encode": "builtin", "collection": "$c"},
    }
    assert estimate_pipeline(pipeline(tmp_path, steps, sample=3), ["variables.sample=4"]) == {
        "variables": {"sample": 4},
        "steps": {"c": {"source": "pydocs", "sample": 4}, "v": {"model": "builtin", "collection": "<c>"}},
    }


@pytest.mark.parametrize("name", ["demo", "demo-reranker", "cross-encoder-pydocs"])
def test_shipped_pipelines_can_be_read(name: str) -> None:
    assert "collection" in estimate_pipeline(name)["steps"]


def test_demo_of_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"size 'small' .*tiny"):
        demo(tmp_path / "demo", size="small")


def test_demo_at_its_tiny_size(tmp_path: Path) -> None:
    """The whole demo on 200 documents: every step an artifact, every index in the report, nothing done twice."""
    import torch

    torch.set_num_threads(1)  # more would wait for one another where other work has the cores
    out = tmp_path / "demo"
    paths = demo(out, size="tiny")
    assert all(Manifest.read(path).artifact for path in paths.values() if (path / MANIFEST).is_file())
    assert len(Collection.load(paths["collection"]).documents) == 200
    metrics = json.loads((paths["report"] / "metrics.json").read_text())
    for index in (
        "BM25",
        "teacher",
        "start",
        "distilled",
        "distilled-PQ",
        "distilled-VQ",
        "labels-only",
        "labels+distilled",
    ):
        assert f'"{index}"' in json.dumps(metrics)
    assert Manifest.read(paths["distilled"]).counts["steps"] == 2
    before = manifests(out)
    demo(out, size="tiny")
    assert manifests(out) == before
