"""Tiny random sparse and multi-vector models, and scoring jobs over the tiny collection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tiny

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.sources import make_collection
from retrieval_kd.recipe import validate
from retrieval_kd.teachers.base import Candidates, Scored, ScoringJob, Teacher


def make_masked_model(folder: Path, seed: int = 0) -> Path:
    """A plain transformers directory: a random BERT that predicts masked words."""
    import torch
    from transformers import BertForMaskedLM

    torch.manual_seed(seed)
    BertForMaskedLM(tiny.bert_config()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def make_splade(
    folder: Path, *, prompts: Mapping[str, str] | None = None, lengths: tuple[int | None, int | None] = (None, None)
) -> Path:
    """A SparseEncoder directory: random BERT, SPLADE pooling over its 68 words."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    plain = make_masked_model(folder.with_name(folder.name + "-plain"))
    network = Transformer(str(plain), transformer_task="fill-mask")
    network.query_length, network.document_length = lengths
    model = SparseEncoder(modules=[network, SpladePooling("max")], prompts=dict(prompts) if prompts else None)
    model.save_pretrained(str(folder))
    return folder


def make_inference_free(folder: Path) -> Path:
    """A SparseEncoder with routes: queries are looked up (word ``wI`` weighs I / 10), documents go through a BERT."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    plain = make_masked_model(folder.with_name(folder.name + "-plain"))
    table = folder.with_name(folder.name + "-idf.json")
    table.write_text(json.dumps({word: i / 10 for i, word in enumerate(tiny.WORDS)} | {"[UNK]": 0.0}))
    network = Transformer(str(plain), transformer_task="fill-mask")
    model = SparseEncoder(
        modules=[
            Router.for_query_document(
                query_modules=[SparseStaticEmbedding.from_json(str(table), tokenizer=network.tokenizer, frozen=True)],
                document_modules=[network, SpladePooling("max", activation_function="log1p_relu")],
            )
        ],
        similarity_fn_name="dot",
    )
    model.save_pretrained(str(folder))
    return folder


def make_multi_vector(
    folder: Path,
    *,
    expansion: Mapping[str, Any] | None = None,
    skiplist: Sequence[str] = (),
    prompts: Mapping[str, str] | None = None,
    lengths: tuple[int | None, int | None] = (None, None),
    similarity: str | None = None,
    keep_only: Sequence[int] | None = None,
) -> Path:
    """A MultiVectorEncoder directory as ColBERT is made: random BERT, 8 dimensions a token, unit length, mask."""
    import torch
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    plain = tiny.make_transformer(folder.with_name(folder.name + "-plain"))
    network = Transformer(str(plain))
    network.query_length, network.document_length = lengths
    if expansion:
        network.query_expansion = dict(expansion)
    torch.manual_seed(3)
    names = {"module_input_name": "token_embeddings"}
    dense = Dense(16, 8, bias=False, activation_function=torch.nn.Identity(), **names)
    mask = MultiVectorMask(skiplist_words=list(skiplist), keep_only_token_ids=keep_only)
    model = MultiVectorEncoder(
        modules=[network, dense, Normalize(**names), mask],
        prompts=dict(prompts) if prompts else None,
        similarity_fn_name=similarity,
    )
    model.save_pretrained(str(folder))
    return folder


def make_collection_of(folder: Path, texts: Sequence[str], name: str = "texts") -> Collection:
    """Documents d0, d1, … of these texts."""
    beir = folder / f"{name}-beir"
    (beir / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q0", "text": "w1"}) + "\n")
    (beir / "qrels" / "test.tsv").write_text("q0\td0\t1\n")
    return make_collection(str(beir), folder / name)


T = TypeVar("T", bound=Teacher)


def make_teacher(teacher: type[T], /, **values: Any) -> T:
    """A teacher of a recipe with these values."""
    return teacher(validate(teacher.Recipe, values, "made"))


def make_job(collection: Collection, queries: Mapping[str, tuple[str, Sequence[int]]], work: Path) -> ScoringJob:
    """A job without ready vectors: query id → text and rows of the candidates."""
    candidates = [Candidates(name, text, np.array(rows, dtype=np.int64)) for name, (text, rows) in queries.items()]
    work.mkdir(exist_ok=True)
    return ScoringJob(collection, candidates, (), work)


def score_all(teacher: Teacher, job: ScoringJob) -> Scored:
    """Everything of a job as one shard."""
    return teacher.score(list(job.candidates), [job.collection.documents.texts(c.rows) for c in job.candidates])


def assert_same(found: Scored, expected: Scored, atol: float = 0) -> None:
    """Equal scores (to ``atol``) and equal tokens lost, query by query."""
    for a, b in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    for a, b in zip(found.tokens_lost, expected.tokens_lost, strict=True):
        np.testing.assert_array_equal(a, b)
