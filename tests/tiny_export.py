"""Tiny models of every kind that can be exported, and their exports, made once a test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny
import tiny_encoders

from retrieval_kd.models.export import export_model
from retrieval_kd.models.load import Model
from retrieval_kd.models.parity import Tolerance

PROMPTS = {"query": "query: ", "document": "passage: "}
LENGTHS = (8, 16)
ANYTHING = Tolerance()


def make_pooling(folder: Path) -> Path:
    """A late-interaction model with query expansion, a skip list, and half as many vectors of a document."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    plain = tiny_encoders.make_multi_vector(
        folder.with_name(folder.name + "-whole"),
        expansion={"strategy": "min", "length": 6},
        skiplist=["w1", ":"],
        prompts=PROMPTS,
        lengths=(10, 16),
    )
    model = MultiVectorEncoder(str(plain))
    pooled = MultiVectorEncoder(
        modules=[*model, HierarchicalTokenPooling(2.0, num_protected_tokens=1)], prompts=dict(model.prompts)
    )
    pooled.save_pretrained(str(folder))
    return folder


def make_routed(folder: Path) -> Path:
    """A dense model whose queries go through a network of one layer and its documents through one of two."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    def modules(name: str, layers: int) -> list[object]:
        plain = tiny.make_transformer(folder.with_name(f"{folder.name}-{name}"), layers=layers, seed=layers)
        return [Transformer(str(plain)), Pooling(16, pooling_mode="cls")]

    router = Router.for_query_document(query_modules=modules("query", 1), document_modules=modules("document", 2))
    SentenceTransformer(modules=[router], similarity_fn_name="dot").save_pretrained(str(folder))
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "dense": lambda folder: tiny.make_dense(folder, prompts=PROMPTS, lengths=LENGTHS),
    "dense-routed": make_routed,
    "sparse": lambda folder: tiny_encoders.make_splade(folder, prompts=PROMPTS, lengths=LENGTHS),
    "inference-free": tiny_encoders.make_inference_free,
    "multi-vector": make_pooling,
    "cross-encoder": tiny.make_cross_encoder,
}


def original(shared: Path, name: str) -> Path:
    """The torch model called ``name``, made when it is first asked for."""
    folder = shared / f"export-{name}"
    return folder if folder.is_dir() else MAKERS[name](folder)


def exported(shared: Path, name: str, format: str = "onnx") -> Model:
    """Its export without a collection, made when it is first asked for; int8 within any tolerance."""
    tolerance = None if format == "onnx" else ANYTHING
    return export_model(original(shared, name), format=format, out=shared / f"{name}-{format}", tolerance=tolerance)
