"""PreTTR: a cross-encoder whose first layers read query and document apart (MacAvaney et al. 2020)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from retrieval_kd.errors import InputError
from retrieval_kd.models.pair_reranker import PairReranker, Tokens

ARCHITECTURES = ("bert", "distilbert")


class PreTTR(PairReranker):
    """Scores of pairs by a BERT whose first ``layers_apart`` layers see ``[CLS] query [SEP]`` or ``document [SEP]``.

    The other layers see both; a linear map of [CLS] is the score. A document's positions begin at
    ``query_length`` whatever the query, so that what the first layers make of it can be stored: `document_states`.
    """

    config_keys = ["query_length", "document_length", "layers_apart"]  # noqa: RUF012

    def __init__(
        self, tokenizer: Any, network: Any, *, layers_apart: int = 3, query_length: int = 32, document_length: int = 200
    ) -> None:
        super().__init__(tokenizer, query_length, document_length)
        config = network.config
        if config.model_type not in ARCHITECTURES:
            raise InputError(
                f"the base is a '{config.model_type}'; only {' and '.join(ARCHITECTURES)} can be read apart"
            )
        if not 0 <= layers_apart < config.num_hidden_layers:
            raise InputError(
                f"layers_apart: {layers_apart}: of {config.num_hidden_layers} layers, the last must see both texts"
            )
        if self.max_seq_length > config.max_position_embeddings:
            raise InputError(
                f"query_length and document_length: {query_length} + {document_length} tokens, but the base has "
                f"{config.max_position_embeddings} positions"
            )
        if hasattr(network, "pooler"):
            network.pooler = None  # never used: it would have no gradient
        self.network = network
        self.layers_apart = layers_apart
        self.head = torch.nn.Linear(config.hidden_size, 1, bias=False)

    @classmethod
    def of_config(cls, tokenizer: Any, config: dict[str, Any]) -> Self:
        """A random network of these sizes."""
        from transformers import AutoConfig, AutoModel

        values = dict(config)
        network = values.pop("network")
        return cls(tokenizer, AutoModel.from_config(AutoConfig.for_model(**network)), **values)

    def get_config_dict(self) -> dict[str, Any]:
        """Lengths, layers, and the config of the BERT under ``network``."""
        return {**super().get_config_dict(), "network": json.loads(self.network.config.to_json_string())}

    def scores(self, query: Tokens, document: Tokens) -> Tensor:
        """Scores [n] of n pairs."""
        states = self._alone(query, 0), self._alone(document, 1)
        return self._together(states[0], query.mask, states[1], document.mask)

    def document_states(
        self, documents: Sequence[str], *, dtype: torch.dtype = torch.float32, batch_size: int = 32
    ) -> list[Tensor]:
        """What the first layers make of each document, [tokens, d] on the CPU: all that `score_states` needs of it.

        In ``torch.float16`` it takes half the room; scores then differ by less than 1e-4 (a logit, all-MiniLM-L6-v2).
        """
        self.eval()
        states: list[Tensor] = [torch.empty(0)] * len(documents)
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            tokens = self.tokenize_documents([documents[i] for i in part])
            with torch.inference_mode():
                found = self._alone(tokens, 1).to("cpu", dtype)
            for i, row, mask in zip(part, found, tokens.mask.cpu(), strict=True):
                states[i] = row[mask].clone()
        return states

    def score_states(self, query: str, states: Sequence[Tensor], *, batch_size: int = 32) -> Tensor:
        """Scores float32 [n] on the CPU of ``query`` with n documents whose states were stored."""
        self.eval()
        with torch.inference_mode():
            tokens = self.tokenize_queries([query])
            of_query = self._alone(tokens, 0)
            scores = [torch.empty(0)]
            for start in range(0, len(states), batch_size):
                documents, mask = _padded(states[start : start + batch_size], of_query)
                n = len(documents)
                found = self._together(of_query.expand(n, -1, -1), tokens.mask.expand(n, -1), documents, mask)
                scores.append(found.float().cpu())
            return torch.cat(scores)

    def _alone(self, tokens: Tokens, kind: int) -> Tensor:
        """States [n, L, d] after the first layers, of queries (``kind`` 0) or documents (1)."""
        first = self.query_length if kind else 0
        positions = torch.arange(first, first + tokens.ids.shape[1], device=tokens.ids.device)[None]
        types = (
            {"token_type_ids": torch.full_like(tokens.ids, kind)} if self.network.config.model_type == "bert" else {}
        )
        states = self.network.embeddings(input_ids=tokens.ids, position_ids=positions, **types)
        return self._through(self._layers[: self.layers_apart], states, tokens.mask)

    def _together(self, query: Tensor, query_mask: Tensor, document: Tensor, document_mask: Tensor) -> Tensor:
        """Scores [n] from the states [n, Q, d] and [n, D, d] of both texts."""
        states = torch.cat([query, document], dim=1)
        mask = torch.cat([query_mask, document_mask], dim=1)
        scores: Tensor = self.head(self._through(self._layers[self.layers_apart :], states, mask)[:, 0])[:, 0]
        return scores

    def _through(self, layers: Any, states: Tensor, mask: Tensor) -> Tensor:
        from transformers.masking_utils import create_bidirectional_mask

        attention = create_bidirectional_mask(
            config=self.network.config, inputs_embeds=states, attention_mask=mask.long()
        )
        for layer in layers:
            states = layer(states, attention)
        return states

    @property
    def _layers(self) -> Any:
        bert = self.network.config.model_type == "bert"
        return self.network.encoder.layer if bert else self.network.transformer.layer


def _padded(states: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Stored states as [n, D, d] of the type and device of ``like``, and where they are no padding."""
    padded = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(like)
    lengths = torch.tensor([len(state) for state in states], device=like.device)
    return padded, torch.arange(padded.shape[1], device=like.device) < lengths[:, None]
