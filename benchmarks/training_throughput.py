"""Training throughput: `retrieval_kd` against the stock sentence-transformers script that trains the same.

Both start from the same network, see the same groups in the same order with the same batch size, loss (KL over the
group), lengths and precision, and take the same number of steps. The stock script is what its documentation shows:
a dataset of (query, document_1 … document_N) with teacher scores, `DistillKLDivLoss` and `SentenceTransformerTrainer`.
Tokens are counted before padding and with repetition: those that the stock script has to encode.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from retrieval_kd import build_index, encode, make_collection, score, search_run

LENGTHS = {"query_length": 32, "document_length": 160}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="scifact")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--work", type=Path, help="keep collection, candidates and scores here")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        print(json.dumps(_compare(arguments, work, Path(folder)), indent=2))


def _compare(arguments: argparse.Namespace, work: Path, scratch: Path) -> dict[str, Any]:
    import torch

    collection, scores = _data(arguments.dataset, work)
    ours_seconds, stock_seconds = [], []
    dataset, tokens = _same_groups(arguments, collection, scores)
    for repeat in range(arguments.repeats + 1):  # the first is for warming up
        ours = _ours(arguments, collection, scores, scratch / f"ours-{repeat}")
        stock = _stock(arguments, dataset, scratch / f"stock-{repeat}")
        if repeat:
            ours_seconds.append(ours)
            stock_seconds.append(stock)
    best = {"retrieval_kd": min(ours_seconds), "sentence-transformers": min(stock_seconds)}
    return {
        "what": f"{arguments.steps} steps of {arguments.batch_size} queries with {arguments.documents} documents",
        "dataset": arguments.dataset,
        "model": "builtin (all-MiniLM-L6-v2)",
        "precision": arguments.precision,
        "lengths": LENGTHS,
        "tokens": tokens,
        "seconds": {"retrieval_kd": ours_seconds, "sentence-transformers": stock_seconds},
        "tokens_per_second": {name: round(tokens / seconds) for name, seconds in best.items()},
        "ratio": round(best["sentence-transformers"] / best["retrieval_kd"], 3),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }


def _data(dataset: str, work: Path) -> tuple[Any, Path]:
    """The collection and the built-in bi-encoder's scores of 20 BM25 candidates for each training query."""
    collection = make_collection(str(Path(os.environ["BEIR_DIR"]) / dataset), work / "collection")
    build_index("indexes/bm25", collection=collection, out=work / "bm25")
    search_run(work / "bm25", collection, "train", work / "candidates", k=20)
    encode("builtin", collection, work / "documents")
    encode("builtin", collection, work / "queries", queries="train")
    vectors = [work / "documents", work / "queries"]
    inputs = {"collection": collection, "candidates": [work / "candidates"], "vectors": vectors}
    return collection, score("teachers/bi-encoder", **inputs, out=work / "scores").path


def _recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": "dense",
        "base": "builtin",
        "groups": {"documents": arguments.documents, "positive": "teacher", "negatives": "random"},
        "losses": [{"kind": "kl", "teacher_temperature": 0.05}],
        "scale": {"initial": 20, "learned": False},
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "development": {"against": "nothing"},
        **LENGTHS,
    }


def _same_groups(arguments: argparse.Namespace, collection: Any, scores: Path) -> tuple[Any, int]:
    """The groups that our trainer draws, as a dataset for the stock trainer; and their tokens."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from retrieval_kd.models.encoder import token_lengths
    from retrieval_kd.models.load import find_model
    from retrieval_kd.students.collate import GroupCollator
    from retrieval_kd.students.dense import DenseStudent
    from retrieval_kd.students.inputs import TrainingInputs
    from retrieval_kd.students.visits import planned_visits

    student = DenseStudent(DenseStudent.Recipe.model_validate(_recipe(arguments)))
    recipe = student.recipe
    queries = TrainingInputs(collection, recipe, [scores]).queries().queries
    visits = planned_visits(queries, recipe.batch_size * arguments.steps, recipe.seed)
    collator = GroupCollator(student, None, collection, queries, recipe.groups, recipe.seed)
    rows = []
    for start in range(0, len(visits), recipe.batch_size):
        batch = collator.batch([visits[i] for i in range(start, start + recipe.batch_size)])
        for i, query in enumerate(batch.queries):
            texts = {f"document_{n}": batch.documents[c] for n, c in enumerate(batch.column[i].tolist())}
            rows.append({"query": query, **texts, "label": (batch.teacher[i] * 20).tolist()})
    tokenizer = SentenceTransformer(str(find_model("builtin").path)).tokenizer
    tokens = 0
    for row in rows:
        documents = [value for key, value in row.items() if key.startswith("document_")]
        tokens += sum(min(n, LENGTHS["query_length"]) for n in token_lengths(tokenizer, [row["query"]]))
        tokens += sum(min(n, LENGTHS["document_length"]) for n in token_lengths(tokenizer, documents))
    return Dataset.from_list(rows), tokens


def _ours(arguments: argparse.Namespace, collection: Any, scores: Path, out: Path) -> float:
    """Seconds of `trainer.train()` of our driver."""
    from retrieval_kd.plan import Draft
    from retrieval_kd.students.dense import DenseStudent
    from retrieval_kd.students.inputs import TrainingInputs

    student = DenseStudent(DenseStudent.Recipe.model_validate(_recipe(arguments)))
    out.mkdir(parents=True)
    fitted = student.fit(TrainingInputs(collection, student.recipe, [scores]), Draft(out, resumed=False))
    return float(fitted.history[-1]["train_runtime"])


def _stock(arguments: argparse.Namespace, dataset: Any, out: Path) -> float:
    """Seconds of the stock trainer on the same groups."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
    from sentence_transformers.util import pairwise_cos_sim
    from torch.utils.data import SequentialSampler

    from retrieval_kd.models.load import find_model

    model = SentenceTransformer(str(find_model("builtin").path))
    model[0].query_length, model[0].document_length = LENGTHS["query_length"], LENGTHS["document_length"]
    model.max_seq_length = LENGTHS["document_length"]
    model.model_card_data.generate_widget_examples = False
    training = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        batch_sampler=lambda data, **options: DefaultBatchSampler(SequentialSampler(data), **options),
        bf16=arguments.precision == "bf16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = DistillKLDivLoss(model, similarity_fct=lambda a, b: 20 * pairwise_cos_sim(a, b))
    trainer = SentenceTransformerTrainer(model=model, args=training, train_dataset=dataset, loss=loss)
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
