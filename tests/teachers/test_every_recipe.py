"""Every shipped teacher recipe, run through the driver with a tiny model: what a score file promises holds for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_server
import numpy as np
import pytest
import tiny_encoders
import tiny_language_models

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.merge_scores import merge_scores
from retrieval_kd.data.run import Run
from retrieval_kd.data.scores import Scores
from retrieval_kd.recipe import load_recipe, recipe_roots
from retrieval_kd.teachers.score import score
from retrieval_kd.verify import check

RECIPES = sorted(
    path.stem
    for root in recipe_roots()
    for path in (root / "teachers").glob("*.yaml")
    if not path.stem.startswith("ensemble")  # these read score files: test_ensemble.py
)
QUERIES = [f"train-{i}" for i in range(8)]


@pytest.fixture(scope="module")
def models(shared: Path, dense: Path, cross_encoder: Path) -> dict[str, Path]:
    """Kind → a random model of 16 dimensions."""
    folder = shared / "conformance"
    return {
        "bi-encoder": dense,
        "cross-encoder": cross_encoder,
        "sparse": tiny_encoders.make_splade(folder / "splade"),
        "late-interaction": tiny_encoders.make_multi_vector(folder / "colbert"),
        "seq2seq": tiny_language_models.make_encoder_decoder(folder / "t5"),
        "causal": tiny_language_models.make_causal(folder / "causal", length=4096),
    }


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Grades and orders by a hash of what is asked, and log-probabilities of Yes and No."""
    with faulty_server.running() as server:
        server.content = answer
        plain = server.good

        def good(body: dict[str, Any]) -> dict[str, Any]:
            reply = plain(body)
            if body.get("logprobs"):
                yes = {"token": "Yes", "logprob": -0.1 - sum(json.dumps(body).encode()) % 7}
                first = {**yes, "top_logprobs": [yes, {"token": "No", "logprob": -2.5}]}
                reply["choices"][0]["logprobs"] = {"content": [first]}
            return reply

        server.good = good  # type: ignore[method-assign]
        yield server.base_url


def answer(body: dict[str, Any]) -> str:
    text = body["messages"][-1]["content"]
    if body.get("logprobs"):
        return "Yes"
    if "grade" in text.lower():
        return str(sum(text.encode()) % 4)
    n = text.count("\n[")
    first = sum(text.encode()) % n + 1
    return " > ".join(f"[{i}]" for i in [first, *(i for i in range(1, n + 1) if i != first)])


@pytest.fixture(scope="module")
def candidates_of_eight(shared: Path, collection: Collection) -> Path:
    """Seven documents for each of eight queries, in an order that is not that of the ids."""
    hits = [[f"d{(5 * i + 11 * j) % 40:02d}" for j in range(7)] for i in range(len(QUERIES))]
    run = Run.from_hits(QUERIES, hits, [np.arange(7, 0, -1, dtype=np.float32)] * len(QUERIES))
    run.save(shared / "eight", recipe={"kind": "made"}, inputs={"collection": collection.ref()})
    return shared / "eight"


@pytest.mark.parametrize("name", RECIPES)
class TestEveryRecipe:
    """One recipe after another; models and endpoint are small ones."""

    @pytest.fixture
    def run(
        self, name: str, models: dict[str, Path], endpoint: str, collection: Collection, candidates_of_eight: Path,
        tmp_path: Path,
    ) -> Any:  # fmt: skip
        kind = load_recipe(f"teachers/{name}", "teachers").kind
        overrides = ["pairs_per_shard=21", "depth=null"]
        if kind == "api":
            overrides += [f"base_url={endpoint}", "key_env=null", f"cache={tmp_path / 'cache'}"]
        elif kind.startswith("llm"):
            overrides.append(f"model={models['seq2seq' if name == 'monot5' else 'causal']}")
            overrides += ["max_length=2000"] if kind == "llm-listwise" else ["max_length=500"]
        elif kind in models:
            overrides.append(f"model={models[kind]}")
        if kind == "cross-encoder":
            overrides.append("max_length=32")

        def scores(out: str, **arguments: Any) -> Scores:
            more = arguments.pop("overrides", [])
            arguments = {"collection": collection, "candidates": [candidates_of_eight], **arguments}
            return score(f"teachers/{name}", out=tmp_path / out, overrides=[*overrides, *more], **arguments)

        return scores

    def test_it_keeps_what_a_score_file_promises(self, name: str, run: Any, tmp_path: Path) -> None:
        """Complete, finite, float32, the same bytes again and in slices, described by its manifest."""
        whole = run("whole")
        assert [row.query_id for row in whole] == QUERIES and check(whole.path) == []
        assert whole.manifest.counts["pairs"] == 56 and whole.manifest.counts["failed_pairs"] == 0
        assert len(whole.shards) == 3
        for i, row in enumerate(whole):
            assert row.doc_ids == [f"d{(5 * i + 11 * j) % 40:02d}" for j in range(7)]
            assert row.scores.dtype == np.float32 and np.isfinite(row.scores).all()
            assert row.tokens_lost is not None and row.tokens_lost.tolist() == [0] * 7
        details = whole.manifest.details
        assert {"score_kind", "independent", "teacher", "model"} <= details.keys()
        if whole.score_kind == "rank" and details["independent"] is False:
            shuffles = whole.manifest.recipe["shuffles"] or 1
            assert all(np.isclose(row.scores.sum() * shuffles, -28 * shuffles) for row in whole)
        slices = [run(f"part-{i}", shard=f"{i}/2").path for i in (1, 2)]
        assert merge_scores(slices, tmp_path / "merged").fingerprint == whole.fingerprint

    def test_pairs_one_by_one_have_the_same_scores(self, name: str, run: Any, tmp_path: Path) -> None:
        """Padding and batches change nothing; a list's ranks are its own whatever list stands beside it."""
        whole = {row.query_id: row for row in run("whole")}
        alone = tmp_path / "one.trec"
        independent = Scores.load(tmp_path / "whole").manifest.details["independent"]
        documents = whole["train-3"].doc_ids[:1] if independent else whole["train-3"].doc_ids
        alone.write_text("".join(f"train-3 Q0 {d} 1 {-j} made\n" for j, d in enumerate(documents)))
        (row,) = run("alone", candidates=[alone])
        np.testing.assert_allclose(row.scores, whole["train-3"].scores[: len(documents)], atol=1e-4)
