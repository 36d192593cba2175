"""A tiny world for tests of models, teachers and students: a collection of 40 documents and random transformers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.sources import make_collection

WORDS = [f"w{i}" for i in range(60)]
DOCUMENTS = 40
QUERIES = {"train": 30, "dev": 6, "test": 6}


def document_text(row: int) -> str:
    """Document ``row``: its own word, then words that a few others have too."""
    return " ".join(WORDS[i] for i in (row, 40 + row % 10, 50 + row % 7, 50 + row % 3))


def make_tiny_collection(folder: Path, name: str = "tiny") -> Collection:
    """Documents d00 to d39; query ``train-5`` is document 5's own word and one that others share, d05 its relevant."""
    beir = folder / f"{name}-beir"
    (beir / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{i:02d}", "title": "", "text": document_text(i)} for i in range(DOCUMENTS)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [
        {"_id": f"{split}-{i}", "text": f"{WORDS[i]} {WORDS[40 + i % 10]}"}
        for split, number in QUERIES.items()
        for i in range(number)
    ]
    (beir / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    for split, number in QUERIES.items():
        lines = [f"{split}-{i}\td{i:02d}\t1\n" for i in range(number)]
        (beir / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return make_collection(str(beir), folder / name)


def make_candidates(folder: Path, collection: Collection, split: str = "train", depth: int = 6) -> Path:
    """A run artifact: for query i the documents i, i+1, …, i+depth-1 (counted round), in that order."""
    ids = list(collection.queries(split))
    hits = [[f"d{(int(query.split('-')[1]) + j) % DOCUMENTS:02d}" for j in range(depth)] for query in ids]
    scores = [np.arange(depth, 0, -1, dtype=np.float32) for _ in ids]
    run = Run.from_hits(ids, hits, scores)
    out = folder / f"candidates-{split}-{depth}"
    run.save(out, recipe={"kind": "made", "depth": depth}, inputs={"collection": collection.ref()})
    return out


def tokenizer(max_length: int = 32) -> Any:
    """A BERT tokenizer that knows the words of the documents and lower-case ``query:`` and ``passage:``."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *WORDS, "query", "passage", ":"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=max_length)


def bert_config(layers: int = 2, **changes: Any) -> Any:
    """16 dimensions, 2 heads."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=68,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        **changes,
    )


def make_transformer(folder: Path, *, layers: int = 2, seed: int = 0, **changes: Any) -> Path:
    """A plain transformers directory: a random BERT and its tokenizer."""
    import torch
    from transformers import BertModel

    torch.manual_seed(seed)
    BertModel(bert_config(layers, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_dense(
    folder: Path,
    *,
    layers: int = 2,
    seed: int = 0,
    similarity: str = "cosine",
    prompts: Mapping[str, str] | None = None,
    lengths: tuple[int | None, int | None] = (None, None),
) -> Path:
    """A sentence-transformers directory: random BERT of 16 dimensions, mean pooling; ``lengths`` of query, document."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    plain = make_transformer(folder.with_name(folder.name + "-plain"), layers=layers, seed=seed)
    network = Transformer(str(plain))
    network.query_length, network.document_length = lengths
    model = SentenceTransformer(
        modules=[network, Pooling(16, pooling_mode="mean")],
        similarity_fn_name=similarity,
        prompts=dict(prompts) if prompts else None,
    )
    model.save_pretrained(str(folder))
    return folder


def make_cross_encoder(folder: Path, *, outputs: int = 1, seed: int = 0, layers: int = 2) -> Path:
    """A CrossEncoder directory: a random BERT with ``outputs`` outputs that reads 32 tokens."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    network = BertForSequenceClassification(bert_config(layers, num_labels=outputs))
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def spoil(model: Path) -> Path:
    """``model`` with NaN in its word embedding of ``w7``; every other word stays."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    (name,) = (key for key in weights if key.endswith("word_embeddings.weight"))
    weights[name][5 + 7] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def write_recipe(path: Path, values: Mapping[str, Any]) -> str:
    """The name of a recipe file with these values."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return str(path)


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return np.asarray(matrix / np.linalg.norm(matrix, axis=-1, keepdims=True))


def reference(name: str) -> InputRef:
    """Some model's reference."""
    return InputRef(name * 32, name=f"nobody/{name}")


def ids_of(rows: Sequence[int]) -> list[str]:
    """Document ids of rows."""
    return [f"d{row:02d}" for row in rows]


def log_rows(model: Path) -> list[dict[str, str]]:
    """The lines of a student's training log."""
    with (model / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(model: Path) -> list[float]:
    """The logged losses, in order."""
    return [float(row["loss"]) for row in log_rows(model) if row["loss"]]


def weights(path: Path) -> dict[str, Any]:
    """A model's weights by name."""
    from safetensors.numpy import load_file

    return dict(load_file(path / "model.safetensors"))
