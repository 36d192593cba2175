"""Tiny dense models of other kinds than `tiny.make_dense`, and a batch to try a student's forward pass with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_language_models

from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.students.base import Batch
from retrieval_kd.students.dense import DenseStudent
from retrieval_kd.students.objective import Objective

QUERIES = ["w1 w2 w3", "w4"]
DOCUMENTS = ["w1", "w2 w5 w6 w7 w8", "w4 w9"]


def make_modern_bert(folder: Path, layers: int = 3) -> Path:
    """A plain directory with a random ModernBERT of 16 dimensions."""
    import torch
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=68,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        initializer_range=0.5,
        initializer_cutoff_factor=3.0,
        bos_token_id=2,
        eos_token_id=3,
    )
    ModernBertModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def make_decoder(folder: Path) -> Path:
    """A plain directory with a random decoder (Qwen3) of 16 dimensions and two layers, padded on the left."""
    from transformers import AutoModel

    causal = tiny_language_models.make_causal(folder.with_name(folder.name + "-causal"), length=64)
    network, _ = tiny_language_models.plain(causal)
    network.model.save_pretrained(folder)
    tiny_language_models.word_tokenizer(chat=None).save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).config.num_hidden_layers == 2
    return folder


def make_narrow(folder: Path, *, seed: int = 7, similarity: str = "cosine") -> Path:
    """A sentence-transformers directory of 8 dimensions: `tiny.make_dense` with a projection."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    wide = SentenceTransformer(str(tiny.make_dense(folder.with_name(folder.name + "-wide"), seed=seed)))
    torch.manual_seed(seed)
    projection = Dense(16, 8, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[*wide, projection], similarity_fn_name=similarity).save_pretrained(str(folder))
    return folder


def make_student(base: Path, **values: Any) -> tuple[DenseStudent, Any, Objective]:
    """A dense student, its model (without dropout) and its objective."""
    given = {"kind": "dense", "base": str(base), "losses": [{"kind": "kl"}, {"kind": "info-nce"}], **values}
    student = DenseStudent(DenseStudent.Recipe.model_validate(given))
    model: Any = student.start().eval().to("cpu")
    return student, model, Objective(student, model, WeightedLosses(student.recipe.losses, dimensions=(16, 16)))


def make_batch(queries: Sequence[str] = QUERIES, documents: Sequence[str] = DOCUMENTS) -> Batch:
    """Two groups of two of three documents."""
    return Batch(
        list(queries),
        list(documents),
        column=np.array([[0, 1], [2, 0]]),
        present=np.ones((2, 2), dtype=bool),
        teacher=np.array([[1.0, 0.5], [2.0, -1.0]], dtype=np.float32),
        relevant=np.array([[True, False, False], [False, False, True]]),
    )


def features_and_labels(student: DenseStudent, model: Any, batch: Batch) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a trainer gives the loss."""
    import torch

    columns = student.tokenize(model, batch)
    features = [
        {key.removeprefix(f"{task}_"): value for key, value in columns.items() if key.startswith(f"{task}_")}
        for task in ("query", "document")
    ]
    names = ("column", "present", "teacher", "relevant")
    labels = {name: torch.from_numpy(getattr(batch, name)) for name in names}
    return features, {**labels, "query": torch.arange(len(batch.queries))}


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    """The gradients that are not zero."""
    model.zero_grad()
    loss.backward()
    return {
        name: weights.grad.clone()
        for name, weights in model.named_parameters()
        if weights.grad is not None and weights.grad.any()
    }
