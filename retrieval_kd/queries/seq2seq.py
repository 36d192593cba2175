"""Queries sampled from an encoder-decoder that was trained to write them: doc2query-T5 and the like."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from retrieval_kd.data.collection import Document, model_text
from retrieval_kd.errors import InputError
from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.language_model import LanguageModel, Precision
from retrieval_kd.queries.base import DocumentQueriesRecipe, Made, approximate_tokens
from retrieval_kd.queries.local_model import LocalModelQueryMaker

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection


class Seq2SeqRecipe(DocumentQueriesRecipe):
    """Keys of ``kind: seq2seq``."""

    kind: Literal["seq2seq"]
    model: str
    revision: str | None = None
    per_document: int = Field(default=3, ge=1)
    prefix: str = ""
    """What the model was trained to see before a document."""
    document_length: int = Field(default=384, ge=8)
    """Tokens of a document with its prefix and end; what is cut is counted."""
    query_length: int = Field(default=64, ge=1)
    """The most tokens of a query."""
    top_k: int = Field(default=25, ge=1)
    top_p: float = Field(default=0.95, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    batch_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens of a batch, all queries of its documents counted; by default as many as suit the device."""
    precision: Precision = "auto"


class Seq2SeqQueries(LocalModelQueryMaker):
    """Queries sampled from the ``top_k`` likeliest tokens within ``top_p``, as in doc2query-T5 and GPL.

    doc2query (Nogueira et al. 2019, arXiv 1904.08375), GPL (Wang et al. 2022, arXiv 2112.07577). The sampling of a
    chunk is seeded by the recipe's seed and the chunk's first document.
    """

    Recipe = Seq2SeqRecipe
    recipe: Seq2SeqRecipe

    @cached_property
    def network(self) -> LanguageModel:
        """The loaded model. Raises `InputError` for one that is no encoder-decoder."""
        loaded = LanguageModel.load(self.source, precision=self.recipe.precision)
        if not loaded.encoder_decoder:
            raise InputError(f"model '{self.source.name}' is no encoder-decoder; ask it by a prompt with kind: llm")
        return loaded

    def details(self) -> dict[str, Any]:
        """Model and revision."""
        return {"model": self.source.name, "revision": self.source.revision}

    def from_documents(self, rows: Sequence[int], documents: Sequence[Document]) -> Made:
        """``per_document`` queries for each document that is not empty."""
        import torch

        texts = [model_text(document.title, document.text) for document in documents]
        filled = [i for i, text in enumerate(texts) if text]
        tokens = self.network.tokenize([self.recipe.prefix + self.network.ordinary(texts[i]) for i in filled])
        limit = self.recipe.document_length
        lost = [len(ids) - limit for ids in tokens if len(ids) > limit]
        tokens = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in tokens]  # its end stays
        made: list[list[str]] = [[] for _ in documents]
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence([self.recipe.seed, rows[0]]).generate_state(1)[0]))
            for i, queries in zip(filled, self._sampled(tokens), strict=True):
                made[i] = queries
        return Made(made, {"truncated_documents": len(lost), "tokens_lost": sum(lost)})

    def estimate(self, collection: Collection) -> dict[str, Any]:
        """Documents, the most queries, and about how many tokens are read and at most written."""
        counts = super().estimate(collection)
        read = approximate_tokens(collection, self.rows(len(collection.documents)), 0, self.recipe.document_length)
        written = counts["queries_at_most"] * self.recipe.query_length
        return {**counts, "approximate_tokens": read, "written_tokens_at_most": written}

    def _sampled(self, tokens: Sequence[Sequence[int]]) -> list[list[str]]:
        """``per_document`` samples for each prompt (token ids)."""
        import torch

        recipe, model = self.recipe, self.network
        found: list[list[str]] = [[] for _ in tokens]
        budget = (recipe.batch_tokens or model.usual_batch_tokens) // recipe.per_document
        for batch in token_batches([len(ids) for ids in tokens], max(1, budget)):
            rows = [torch.tensor(tokens[i]) for i in batch]
            pad = torch.nn.utils.rnn.pad_sequence
            inputs = {
                "input_ids": pad(rows, batch_first=True, padding_value=model.network.generation_config.pad_token_id),
                "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            }
            with torch.inference_mode():
                written = model.network.generate(
                    **{name: value.to(model.network.device) for name, value in inputs.items()},
                    do_sample=True,
                    top_k=recipe.top_k,
                    top_p=recipe.top_p,
                    temperature=recipe.temperature,
                    num_return_sequences=recipe.per_document,
                    max_new_tokens=recipe.query_length,
                )
            texts = model.tokenizer.batch_decode(written, skip_special_tokens=True)
            for place, i in enumerate(batch):
                found[i] = texts[place * recipe.per_document : (place + 1) * recipe.per_document]
        return found
