"""The SPLADE student: a text is a vector over the vocabulary, the largest logits of its tokens, kept sparse."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.recipe import Section
from retrieval_kd.students.base import StudentRecipe
from retrieval_kd.students.bi_encoder import BiEncoderStudent
from retrieval_kd.students.sparsity import Regularisation, SparseLoss

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor, nn

    from retrieval_kd.models.load import ModelSource
    from retrieval_kd.plan import Draft
    from retrieval_kd.students.base import Fitted
    from retrieval_kd.students.inputs import TrainingInputs
    from retrieval_kd.students.objective import Objective

log = logging.getLogger("retrieval_kd")

_SAMPLE = 128
"""The documents that the bias of a new head is set on."""
_ACTIVATIONS = {"log1p": "relu", "double-log1p": "log1p_relu"}
"""Our names (all begin with a relu) and those of ``SpladePooling``."""


class Pruned(Section):
    """What is kept of a text's terms when it is encoded: the heaviest ``top_terms`` of those above ``threshold``."""

    top_terms: int | None = Field(default=None, ge=1)
    threshold: float = Field(default=0.0, ge=0)


class Pruning(Section):
    """Pruning of documents and of queries, at encoding time only: training sees whole vectors."""

    document: Pruned = Pruned()
    query: Pruned = Pruned()


class SparseRecipe(StudentRecipe):
    """The keys of all sparse students. A text costs vocabulary × tokens floats: keep ``texts_at_once`` small.

    ``head_divisor`` divides the logits of the base's masked-LM head before training; 16 for ModernBERT and Ettin.
    """

    regularisation: Regularisation
    pruning: Pruning = Pruning()
    prompts: dict[Literal["query", "document"], str] = Field(default_factory=dict)
    activation: Literal["log1p", "double-log1p"] = "log1p"
    head_divisor: float = Field(default=1.0, gt=0)
    texts_at_once: int = Field(default=8, ge=1)


class SparseStudent(BiEncoderStudent):
    """A `SparseEncoder` whose documents go through a masked language model; vectors are compared by dot product.

    Formal et al., SPLADE v2, 2021. A batch keeps the vectors of its U documents whole: 4 · V bytes each, 0.12 MB for
    BERT's vocabulary.
    """

    recipe: SparseRecipe

    def __init__(self, recipe: SparseRecipe) -> None:
        super().__init__(recipe)
        self.head = "the base's own"
        self._loss: SparseLoss | None = None

    def fit(self, inputs: TrainingInputs, draft: Draft) -> Fitted:
        """The model after training; the collection's documents give the bias of a new head and the IDF table."""
        self.documents = inputs.collection.documents
        fitted = super().fit(inputs, draft)
        draft.details["head"] = self.head
        return fitted

    @abstractmethod
    def start(self) -> BaseModel:
        """The `SparseEncoder` that training starts from."""

    def document_modules(self) -> list[Any]:
        """The masked language model, with a head in any case, and SPLADE's max pooling."""
        from sentence_transformers.sparse_encoder.modules import SpladePooling

        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.models.load import find_model
        from retrieval_kd.models.mlm_head import divide_head
        from retrieval_kd.models.splade_pooling import pool_maxima_first

        network, has_head = self.language_model(find_model(self.recipe.base))
        if self.recipe.layers is not None:
            keep_layers(network.auto_model, self.recipe.layers)
        if self.recipe.query_length is not None:
            network.query_length = self.recipe.query_length
        if self.recipe.document_length is not None:
            network.document_length = self.recipe.document_length
        if not has_head:
            self._start_head(network)
        if self.recipe.head_divisor != 1:
            divide_head(network.auto_model, self.recipe.head_divisor)
        pooling = SpladePooling(
            "max",
            activation_function=_ACTIVATIONS[self.recipe.activation],
            embedding_dimension=network.auto_model.config.vocab_size,
        )
        pool_maxima_first(pooling)
        return [network, pooling]

    def language_model(self, source: ModelSource) -> tuple[Transformer, bool]:
        """The base as a masked language model, and whether its head was trained."""
        from sentence_transformers import SparseEncoder
        from sentence_transformers.base.modules import Router, Transformer

        from retrieval_kd.models.encoder import new_parts_expected
        from retrieval_kd.models.mlm_head import has_head

        settings = saved_settings(source)
        if settings.get("model_type") == "SparseEncoder":
            first = SparseEncoder(str(source.path))[0]
            return (first.sub_modules["document"][0] if isinstance(first, Router) else first), True
        modules = source.path / "modules.json"
        subfolder = json.loads(modules.read_text(encoding="utf-8"))[0]["path"] if modules.is_file() else ""
        folder = source.path / subfolder
        found = has_head(folder)
        config = Transformer.load_config(str(source.path), subfolder=subfolder)
        kept = {key: config[key] for key in ("max_seq_length", "do_lower_case") if config.get(key)}
        with new_parts_expected():
            return Transformer(str(folder), transformer_task="fill-mask", **kept), found

    def _start_head(self, network: Transformer) -> None:
        """Gives the network a head and says so."""
        from retrieval_kd.models.mlm_head import start_head

        rows = np.unique(np.linspace(0, len(self.documents) - 1, _SAMPLE).astype(np.int64))
        length = self.recipe.document_length or network.max_seq_length
        terms = start_head(network.auto_model, network.tokenizer, self.documents.texts(rows), length)
        self.head = (
            f"tied word embeddings (the base has no trained masked-LM head), bias set on {len(rows)} documents to "
            f"{terms:.0f} active terms each"
        )
        log.warning("%s: the head starts as %s", self.recipe.base, self.head)

    def prompts(self) -> dict[str, str]:
        """The base's prompts, and the recipe's over them."""
        from retrieval_kd.models.load import find_model

        return {**(saved_settings(find_model(self.recipe.base)).get("prompts") or {}), **self.recipe.prompts}

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """`SparseEncoderTrainer`."""
        from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments

        return SparseEncoderTrainer, SparseEncoderTrainingArguments

    def loss(self, objective: Objective) -> nn.Module:
        """The objective with the recipe's sparsity penalties."""
        settings = self.recipe.regularisation
        by_idf = "idf-flops" in (settings.document.kind, settings.query and settings.query.kind)
        self._loss = SparseLoss(objective, settings, self._coefficients(objective.model) if by_idf else None)
        return self._loss

    def _coefficients(self, model: Any) -> Tensor:
        """What a term pays in ``idf-flops`` [V]; rows of the vocabulary without a token pay most."""
        import torch

        from retrieval_kd.losses.regularisers import idf_coefficients
        from retrieval_kd.models.idf import idf_of_texts

        table = idf_of_texts(self.documents.iter_texts(), model.tokenizer)
        coefficients = idf_coefficients(torch.from_numpy(table.weights))
        missing = int(model.get_embedding_dimension()) - len(coefficients)
        return torch.nn.functional.pad(coefficients, (0, missing), value=float(coefficients.max()))

    def callbacks(self, objective: Objective) -> list[Any]:
        """The schedule of the penalties, and the columns ``query_terms`` and ``document_terms`` of the log."""
        assert self._loss is not None
        return [*super().callbacks(objective), *self._loss.callbacks(self.recipe.regularisation)]

    def compare(self, queries: Tensor, documents: Tensor, parameters: Any) -> Tensor:
        """Dot products [B, U]."""
        return queries @ documents.T

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Dot products [queries, documents] of pruned vectors."""
        options = {"batch_size": self.recipe.texts_at_once, "show_progress_bar": False}
        q = _pruned(model.encode_query(list(queries), **options), self.recipe.pruning.query)
        d = _pruned(model.encode_document(list(documents), **options), self.recipe.pruning.document)
        return np.asarray((q @ d.T).todense(), dtype=np.float32)

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """Similarity, pruning, and what the head started as."""
        return {"similarity": "dot", "pruning": self.recipe.pruning.model_dump(), "head": self.head}

    def notes(self) -> list[str]:
        """The head's start, the penalties and the pruning."""
        penalties = self.recipe.regularisation.model_dump(exclude_none=True)
        return [
            f"The masked-LM head started as: {self.head}.",
            f"Sparsity penalties: {json.dumps(penalties)}.",
            f"Kept when a text is encoded with retrieval_kd: {json.dumps(self.recipe.pruning.model_dump())}.",
        ]


class SpladeStudent(SparseStudent):
    """SPLADE with queries and documents through the same network, a masked or (``echo``) a causal language model."""

    class Recipe(SparseRecipe):
        """Keys of ``kind: splade``.

        ``echo: true`` takes a causal language model, which reads each text twice; lengths are those of one copy.
        """

        kind: Literal["splade"]
        echo: bool = False

        @model_validator(mode="after")
        def _goes_together(self) -> SpladeStudent.Recipe:
            if self.echo and self.head_divisor != 1:
                raise ValueError("head_divisor is for masked language models, not for echo")
            if self.regularisation.query is None:
                raise ValueError("regularisation.query is missing: queries are learned, and nothing keeps them sparse")
            return self

    recipe: Recipe

    def start(self) -> BaseModel:
        """One network for both sides."""
        from sentence_transformers import SparseEncoder

        return SparseEncoder(modules=self.document_modules(), prompts=self.prompts(), similarity_fn_name="dot")

    def language_model(self, source: ModelSource) -> tuple[Transformer, bool]:
        """A masked language model, or a causal one that reads twice: its output is always tied, so it has a head."""
        if not self.recipe.echo:
            return super().language_model(source)
        from retrieval_kd.models.echo import EchoTransformer

        self.head = "the word embeddings of the causal language model"
        return EchoTransformer.of(str(source.path)), True

    def notes(self) -> list[str]:
        """What an echo model needs to be loaded, too."""
        needs = "Reads each text twice; load it with trust_remote_code=True where retrieval_kd is installed."
        return [*super().notes(), *([needs] if self.recipe.echo else [])]


def saved_settings(source: ModelSource) -> dict[str, Any]:
    """What sentence-transformers saved with a model: its class, its prompts; empty for a plain transformer."""
    path: Path = source.path / "config_sentence_transformers.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings


def _pruned(vectors: Tensor, limits: Pruned) -> Any:
    """Sparse vectors [n, V] of a sparse tensor, as a CSR matrix of what is kept of each."""
    from scipy.sparse import csr_matrix, vstack

    from retrieval_kd.models.vectors_of_texts import strongest

    found = vectors.coalesce().cpu()
    whole = csr_matrix((found.values().float().numpy(), found.indices().numpy()), shape=tuple(found.shape))
    rows = []
    for row in whole:
        terms, weights = strongest(row.indices, row.data, **limits.model_dump())
        rows.append(csr_matrix((weights, terms, [0, len(terms)]), shape=(1, whole.shape[1])))
    return vstack(rows, format="csr")
