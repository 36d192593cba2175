"""Pairs a second of the cross-encoder teacher and of `CrossEncoder.predict`, on the same pairs.

Run: python benchmarks/cross_encoder_scoring.py --beir $BEIR_DIR/scifact [--queries 300] [--depth 50] [--out FILE.json]
The pairs are queries of a split with BM25's best documents. The model has the built-in MiniLM-L6's weights and a random
head, which changes no time. Every round runs each system once, one after another, so that a machine that is busy with
other work shows in the spread of the rounds; "x predict" is the median over the rounds of a system's speed divided by
that of the faster predict in the same round. A round of 300 x 50 pairs takes most of an hour on two cores, one of
--queries 12 two minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd import build_index, make_collection, search_run
from retrieval_kd.data.collection import Collection
from retrieval_kd.eval.efficiency import machine
from retrieval_kd.models.encoder import quiet_loading
from retrieval_kd.models.load import find_model
from retrieval_kd.software import software_versions
from retrieval_kd.teachers.base import Candidates, ScoringJob
from retrieval_kd.teachers.cross_encoder import CrossEncoderTeacher

DEFAULT_BATCH_SIZE = 32
BATCH_SIZES = (8, 16, 32, 64, 128)
HEAD = 10.0
"""Standard deviation of the head's weights: logits then spread by about 5, as those of MS MARCO cross-encoders do."""
Scorer = Callable[[], np.ndarray]


def make_model(path: Path) -> None:
    """Writes the built-in encoder with a random head (seed 0) whose logits spread as a real one's do."""
    import torch
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    with quiet_loading():
        model = CrossEncoder(str(find_model("builtin").path), num_labels=1, device="cpu")
        torch.nn.init.normal_(model[0].auto_model.classifier.weight, std=HEAD)
        model.save_pretrained(str(path))


def make_candidates(collection: Collection, folder: Path, split: str, queries: int, depth: int) -> list[Candidates]:
    """BM25's ``depth`` best documents for ``queries`` queries, evenly spread over the split."""
    build_index("indexes/bm25", collection=collection, out=folder / "bm25")
    run = list(search_run(folder / "bm25", collection, split, folder / "run", k=depth))
    chosen = np.unique(np.linspace(0, len(run) - 1, min(queries, len(run))).astype(int))
    texts = collection.queries(split)
    return [
        Candidates(query_id, texts[query_id], collection.documents.rows(list(doc_ids)))
        for query_id, doc_ids, _ in (run[i] for i in chosen)
    ]


def teacher_scorer(
    model: Path, job: ScoringJob, max_length: int, *, backend: str, onednn: bool = True
) -> tuple[Scorer, CrossEncoderTeacher]:
    """All logits by the teacher, shard by shard as the verb `score` does it (reading and writing files apart)."""
    recipe = CrossEncoderTeacher.Recipe.model_validate(
        {"kind": "cross-encoder", "model": str(model), "max_length": max_length, "backend": backend}
    )
    teacher = CrossEncoderTeacher(recipe)
    teacher.prepare(job)
    if not onednn:
        teacher._forward = teacher._torch_forward
    depth = max(len(query.rows) for query in job.candidates)
    size = max(1, recipe.pairs_per_shard // depth)
    shards = [job.candidates[i : i + size] for i in range(0, len(job.candidates), size)]

    def scores() -> np.ndarray:
        found = []
        for shard in shards:
            found += teacher.score(shard, [job.collection.documents.texts(query.rows) for query in shard]).scores
        return np.concatenate(found)

    return scores, teacher


def predict_scorer(model: Any, pairs: list[tuple[str, str]], batch_size: int) -> Scorer:
    """All logits by one call of `CrossEncoder.predict`."""
    import torch

    def scores() -> np.ndarray:
        found = model.predict(pairs, batch_size=batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return np.asarray(found)

    return scores


def timed(scorer: Scorer) -> tuple[float, np.ndarray]:
    """Seconds, and the scores."""
    began = time.perf_counter()
    scores = scorer()
    return time.perf_counter() - began, scores


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that is reported."""
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(arguments.threads)
    collection = make_collection(str(arguments.beir), folder / "collection")
    make_model(folder / "model")
    candidates = make_candidates(collection, folder, arguments.split, arguments.queries, arguments.depth)
    pairs = [(query.text, text) for query in candidates for text in collection.documents.texts(query.rows)]
    with quiet_loading():
        model = CrossEncoder(str(folder / "model"), max_length=arguments.max_length, device="cpu")
    read = model.tokenizer([q for q, _ in pairs], [d for _, d in pairs], truncation=True)["input_ids"]

    part = pairs[:: max(1, len(pairs) // arguments.search_pairs)]
    timed(predict_scorer(model, part[:8], 8))
    searched = {size: [timed(predict_scorer(model, part, size))[0] for _ in range(2)] for size in BATCH_SIZES}
    best = min(searched, key=lambda size: min(searched[size]))

    systems: dict[str, Scorer] = {
        f"predict, batch size {DEFAULT_BATCH_SIZE} (its default)": predict_scorer(model, pairs, DEFAULT_BATCH_SIZE)
    }
    systems.setdefault(f"predict, batch size {best} (its best)", predict_scorer(model, pairs, best))
    by_predict = set(systems)
    details = {}
    for name, backend, onednn in (
        ("teacher, torch without oneDNN", "torch", False),
        ("teacher, torch", "torch", True),
        ("teacher, onnx", "onnx", True),
        ("teacher, onnx-int8", "onnx-int8", True),
    ):
        job = ScoringJob(collection, candidates, [], folder / name)
        systems[name], teacher = teacher_scorer(
            folder / "model", job, arguments.max_length, backend=backend, onednn=onednn
        )
        details[name] = teacher.details()
        teacher.score(candidates[:1], [collection.documents.texts(candidates[0].rows)])  # loads what is lazy

    seconds: dict[str, list[float]] = {name: [] for name in systems}
    scores = {}
    for _ in range(arguments.repeats):
        for name, scorer in systems.items():
            taken, scores[name] = timed(scorer)
            seconds[name].append(taken)
    expected, *_ = scores.values()
    speeds = {name: [len(pairs) / one for one in taken] for name, taken in seconds.items()}
    predict = [max(of_round) for of_round in zip(*(v for k, v in speeds.items() if k in by_predict), strict=True)]
    return {
        "collection": arguments.beir.name,
        "split": arguments.split,
        "queries": len(candidates),
        "pairs": len(pairs),
        "tokens_a_pair": round(float(np.mean([len(ids) for ids in read])), 1),
        "max_length": arguments.max_length,
        "model": "all-MiniLM-L6-v2 with a random head (seed 0)",
        "threads": arguments.threads,
        "predict_batch_sizes": {str(size): round(len(part) / min(taken), 2) for size, taken in searched.items()},
        "standard_deviation_of_scores": float(expected.std()),
        "systems": [
            {
                "name": name,
                "pairs_per_second": round(float(np.median(of_rounds)), 2),
                "rounds": [round(one, 2) for one in of_rounds],
                "times_the_faster_predict": round(float(np.median(np.divide(of_rounds, predict))), 2),
                "largest_difference": float(np.abs(scores[name] - expected).max()),
                "details": {**details.get(name, {}), "model": None} if name in details else None,
            }
            for name, of_rounds in speeds.items()
        ],
        "machine": machine(),
        "software": software_versions(),
    }


def table(result: dict[str, Any]) -> str:
    """The systems as a table for people."""
    lines = [
        f"{result['pairs']:,} pairs of {result['tokens_a_pair']} tokens ({result['queries']} queries of "
        f"{result['collection']}), {result['threads']} threads, {result['model']}",
        f"predict by batch size, pairs/s on a part: {result['predict_batch_sizes']}",
        "",
        f"{'system':36} {'pairs/s':>8} {'slowest - fastest':>18} {'x predict':>10} {'max |difference|':>17}",
    ]
    for system in result["systems"]:
        spread = f"{min(system['rounds'])} - {max(system['rounds'])}"
        lines.append(
            f"{system['name']:36} {system['pairs_per_second']:8} {spread:>18} "
            f"{system['times_the_faster_predict']:10} {system['largest_difference']:17.2e}"
        )
    return "\n".join([*lines, "", f"standard deviation of the scores: {result['standard_deviation_of_scores']:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=Path, required=True, help="a BEIR folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--queries", type=int, default=300, help="evenly spread over the split")
    parser.add_argument("--depth", type=int, default=50, help="BM25's best documents of each query")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--search-pairs", type=int, default=200, help="on which predict's batch size is chosen")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    print(table(result))
    print(json.dumps({"machine": result["machine"], "software": result["software"]}))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
