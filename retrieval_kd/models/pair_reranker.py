"""What re-rankers with a network of their own share: reading pairs, and being run by a stock ``CrossEncoder``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor

from retrieval_kd.errors import InputError, UsageError


class Tokens(NamedTuple):
    """Token ids [n, L] of n texts, padded on the right, and where they are no padding (bool [n, L])."""

    ids: Tensor
    mask: Tensor


class PairReranker(InputModule):
    """The one module of a ``CrossEncoder``: scores [n, 1] of pairs, whose texts are cut at lengths of their own.

    A pair is ``[CLS] query [SEP] document [SEP]``, its parts told apart by their token types. The query's part has at
    most ``query_length`` tokens, the document's ``document_length``, these signs included. Stock sentence-transformers
    loads it with ``trust_remote_code=True`` where this package is installed.
    """

    config_keys = ["query_length", "document_length"]  # noqa: RUF012  (as the base class declares it)

    def __init__(self, tokenizer: Any, query_length: int, document_length: int) -> None:
        super().__init__()
        if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
            raise InputError("the base's tokenizer has no [CLS], [SEP] and [PAD]; take a BERT-like base")
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.query_length = query_length
        self.document_length = document_length

    @abstractmethod
    def scores(self, query: Tokens, document: Tokens) -> Tensor:
        """Scores [n] of n pairs."""

    @classmethod
    @abstractmethod
    def of_config(cls, tokenizer: Any, config: dict[str, Any]) -> Self:
        """The network that ``get_config_dict`` describes, with random weights."""

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest pair."""
        return self.query_length + self.document_length

    def tokenize_pairs(
        self, queries: Sequence[str], documents: Sequence[str]
    ) -> tuple[list[dict[str, list[int]]], np.ndarray]:
        """The features of each pair without padding, and the tokens int32 [n] that were cut off each."""
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        left, lost_left = self._cut(queries, self.query_length - 2)
        right, lost_right = self._cut(documents, self.document_length - 1)
        pairs = []
        for query, document in zip(left, right, strict=True):
            ids = [cls, *query, sep, *document, sep]
            types = [0] * (len(query) + 2) + [1] * (len(document) + 1)
            pairs.append({"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)})
        return pairs, lost_left + lost_right

    def tokenize_documents(self, documents: Sequence[str]) -> Tokens:
        """``document [SEP]`` of each."""
        texts, _ = self._cut(documents, self.document_length - 1)
        return self._padded([[*text, self.tokenizer.sep_token_id] for text in texts])

    def tokenize_queries(self, queries: Sequence[str]) -> Tokens:
        """``[CLS] query [SEP]`` of each."""
        texts, _ = self._cut(queries, self.query_length - 2)
        return self._padded([[self.tokenizer.cls_token_id, *text, self.tokenizer.sep_token_id] for text in texts])

    def preprocess(
        self, inputs: Sequence[tuple[str, str]], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Padded features [n, L] of (query, document) pairs; a prompt stands before the query."""
        pairs, _ = self.tokenize_pairs([(prompt or "") + query for query, _ in inputs], [text for _, text in inputs])
        return dict(self.tokenizer.pad(pairs, return_tensors="pt"))

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """``features`` with ``scores`` [n, 1]."""
        return {**features, "scores": self.scores(*split(features))[:, None]}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes config, tokenizer and weights."""
        self.save_config(output_path)
        self.save_tokenizer(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """The saved network, in float32 or in the ``dtype`` of ``model_kwargs``."""
        from transformers import AutoTokenizer

        if "model_max_length" in (processor_kwargs or {}):
            raise UsageError("max_length: this re-ranker reads query_length and document_length tokens, as trained")
        where = {"subfolder": subfolder, "token": token, "revision": revision, "local_files_only": local_files_only}
        config = cls.load_config(model_name_or_path, cache_folder=cache_folder, **where)
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, cache_dir=cache_folder, **where)
        module = cls.of_config(tokenizer, config)
        cls.load_torch_weights(model_name_or_path, cache_folder=cache_folder, model=module, **where)
        dtype = (model_kwargs or {}).get("dtype")
        return module.to(dtype) if isinstance(dtype, torch.dtype) else module

    def _cut(self, texts: Sequence[str], length: int) -> tuple[list[list[int]], np.ndarray]:
        """The first ``length`` tokens of each text, and how many more it has; a repeated text is read once."""
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(distinct, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = dict(zip(distinct, tokens["input_ids"], strict=True))
        lost = np.array([max(0, len(ids[text]) - length) for text in texts], dtype=np.int32)
        return [ids[text][:length] for text in texts], lost

    def _padded(self, ids: list[list[int]]) -> Tokens:
        padded = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        device = next(self.parameters()).device
        return Tokens(padded["input_ids"].to(device), padded["attention_mask"].to(device).bool())


def split(features: dict[str, Tensor]) -> tuple[Tokens, Tokens]:
    """The query's and the document's part of padded pairs, each moved to the left and cut at its longest."""
    ids, real = features["input_ids"], features["attention_mask"].bool()
    of_query = real & (features["token_type_ids"] == 0)
    starts = of_query.sum(dim=1, keepdim=True)
    lengths = real.sum(dim=1, keepdim=True) - starts
    width = int(starts.max())
    places = torch.arange(int(lengths.max()), device=ids.device)
    columns = (starts + places).clamp(max=ids.shape[1] - 1)
    return Tokens(ids[:, :width], of_query[:, :width]), Tokens(ids.gather(1, columns), places < lengths)
