"""The inference-free SPLADE student: documents through a network, queries by looking their word-pieces up."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from retrieval_kd.artifact import InputRef
from retrieval_kd.errors import InputError
from retrieval_kd.fingerprint import file_sha256
from retrieval_kd.students.splade import SparseRecipe, SparseStudent

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor

    from retrieval_kd.plan import Draft
    from retrieval_kd.students.base import Fitted
    from retrieval_kd.students.inputs import TrainingInputs
    from retrieval_kd.students.objective import Objective

log = logging.getLogger("retrieval_kd")


class SpladeDocStudent(SparseStudent):
    """A `SparseEncoder` with routes: a query's distinct word-pieces weigh their IDF, and no network runs for them.

    Geng et al. 2024, arXiv 2411.04403: plain FLOPS on documents whose terms meet the query's IDF is IDF-aware FLOPS.
    """

    class Recipe(SparseRecipe):
        """Keys of ``kind: splade-doc``.

        ``idf`` is a table (``idf.json``) in place of the collection's own; with ``idf_learning_rate`` it is trained.
        """

        kind: Literal["splade-doc"]
        activation: Literal["log1p", "double-log1p"] = "double-log1p"
        idf: str | None = None
        idf_learning_rate: float | None = Field(default=None, gt=0)

        @model_validator(mode="after")
        def _goes_together(self) -> SpladeDocStudent.Recipe:
            if self.regularisation.query is not None:
                raise ValueError("regularisation.query: a query has the terms of its words; leave it away")
            if self.regularisation.document.kind == "idf-flops":
                raise ValueError("idf-flops on top of a query's IDF would count the IDF twice; take flops")
            if self.lora is not None:
                raise ValueError("lora is not possible with kind splade-doc; take kind splade, or train all weights")
            return self

        def named_inputs(self) -> dict[str, InputRef]:
            """The table, where one is given."""
            if self.idf is None:
                return {}
            path = Path(self.idf)
            if not path.is_file():
                raise InputError(f"idf: {path}: no such file")
            return {"idf": InputRef(file_sha256(path), path=path)}

    recipe: Recipe

    def fit(self, inputs: TrainingInputs, draft: Draft) -> Fitted:
        """The model after training; says how many word-pieces have no IDF of their own."""
        fitted = super().fit(inputs, draft)
        draft.counts["tokens_without_idf"] = self.unseen
        return fitted

    def start(self) -> BaseModel:
        """A router: the IDF table for queries, the network for documents; both over the tokenizer's vocabulary."""
        import torch
        from sentence_transformers import SparseEncoder
        from sentence_transformers.base.modules import Router
        from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

        from retrieval_kd.models.idf import idf_of_texts, read_idf

        network, pooling = self.document_modules()
        tokenizer = copy.deepcopy(network.tokenizer)
        if network.auto_model.config.vocab_size != len(tokenizer):
            # rows that no token has: a table of another length could not be loaded again
            network.auto_model.resize_token_embeddings(len(tokenizer))
            pooling.embedding_dimension = len(tokenizer)
        if self.recipe.query_length is not None:
            tokenizer.model_max_length = self.recipe.query_length
        if self.recipe.idf is not None:
            table = read_idf(self.recipe.idf, tokenizer)
        else:
            table = idf_of_texts(self.documents.iter_texts(), tokenizer)
        self.unseen = table.unseen
        log.info("IDF of %d tokens; %d others have none and weigh 1", table.known, table.unseen)
        lookup = SparseStaticEmbedding(
            tokenizer, weight=torch.from_numpy(table.weights), frozen=self.recipe.idf_learning_rate is None
        )
        router = Router.for_query_document(query_modules=[lookup], document_modules=[network, pooling])
        return SparseEncoder(modules=[router], prompts=self.prompts(), similarity_fn_name="dot")

    def arguments(self) -> dict[str, Any]:
        """The learning rate of the IDF table."""
        if self.recipe.idf_learning_rate is None:
            return {}
        return {"learning_rate_mapping": {r"sub_modules\.query\.0\.weight": self.recipe.idf_learning_rate}}

    def callbacks(self, objective: Objective) -> list[Any]:
        """A trained table never falls below zero, too."""
        from transformers import TrainerCallback

        class NotNegative(TrainerCallback):
            """Keeps the weights of queries at 0 or more."""

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                """After each step of the optimizer."""
                lookup_of(model).weight.data.clamp_(min=0)

        trained = [] if self.recipe.idf_learning_rate is None else [NotNegative()]
        return [*super().callbacks(objective), *trained]

    def embed(self, model: Any, features: dict[str, Any]) -> Tensor:
        """The vectors [n, V] of n texts; queries at once, for there is nothing to compute."""
        if features["task"] == "query":
            vectors: Tensor = model(features)["sentence_embedding"]
            return vectors
        whole: Tensor = super().embed(model, features)
        return whole

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model, and the table as ``idf.json`` for other students and engines."""
        from retrieval_kd.models.idf import IDF_FILE, write_idf

        super().save(model, folder)
        lookup = lookup_of(model)
        write_idf(folder / IDF_FILE, lookup.weight.detach().cpu().numpy(), lookup.tokenizer)

    def notes(self) -> list[str]:
        """Where the weights of queries are from."""
        source = f"the table {Path(self.recipe.idf).name}" if self.recipe.idf else "the collection it was trained on"
        how = "kept" if self.recipe.idf_learning_rate is None else "trained further"
        unseen = f"{self.unseen} tokens without one weigh 1"
        return [
            *super().notes(),
            f"No network runs for a query: its word-pieces weigh the IDF of {source}, {how}; {unseen}.",
        ]


def lookup_of(model: Any) -> Any:
    """The table of an inference-free `SparseEncoder`."""
    while hasattr(model, "module"):  # as distributed training wraps it
        model = model.module
    return model[0].sub_modules["query"][0]
