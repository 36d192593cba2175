"""TK: a re-ranker of word embeddings, two small transformer layers and Gaussian kernels (Hofstätter et al. 2020)."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from retrieval_kd.errors import InputError
from retrieval_kd.models.pair_reranker import PairReranker, Tokens

MU = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
"""The cosines at which the kernels lie."""
SIGMA = 0.1
DOCUMENT_POSITION = 500
"""The position of a document's first token, so that none is also a query's."""


class KernelPooling(torch.nn.Module):
    """Kernels [n, 11]: how much of a document lies near each of a query's tokens, by cosine (Xiong et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.ones(len(MU)))

    def forward(self, cosine: Tensor, query: Tensor, document: Tensor) -> Tensor:
        """Of cosines [n, Q, D] and the masks [n, Q] and [n, D] of the tokens that count."""
        kernels = torch.exp(-((cosine[..., None] - cosine.new_tensor(MU)) ** 2) / (2 * SIGMA**2))
        near = (kernels * document[:, None, :, None]).sum(dim=2)
        return (torch.log((self.alpha * near).clamp(min=1e-10)) * query[..., None]).sum(dim=1)


class TK(PairReranker):
    """Scores of pairs by the cosines of contextualised words, without a pre-trained transformer.

    Tokens are embedded, read by a transformer of their own text alone, and mixed with what they were before. [CLS] and
    [SEP] are read but not compared.
    """

    config_keys = ["query_length", "document_length", "dimension", "heads", "feed_forward", "depth"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: Any,
        *,
        dimension: int,
        heads: int = 8,
        feed_forward: int = 300,
        depth: int = 2,
        query_length: int = 32,
        document_length: int = 200,
    ) -> None:
        super().__init__(tokenizer, query_length, document_length)
        if dimension % (2 * heads):
            raise InputError(f"heads: {heads} heads of an even size do not make {dimension} dimensions")
        self.dimension, self.heads, self.feed_forward, self.depth = dimension, heads, feed_forward, depth
        self.embeddings = torch.nn.Embedding(len(tokenizer), dimension)
        # Without batch_first torch takes no shortcuts in inference, so that it computes what training computed.
        layer = torch.nn.TransformerEncoderLayer(dimension, heads, feed_forward, dropout=0.0, batch_first=False)
        self.context = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mix = torch.nn.Parameter(torch.tensor(0.5))
        self.pooling = KernelPooling()
        self.weights = torch.nn.Parameter(torch.empty(len(MU)).uniform_(-0.014, 0.014))

    @classmethod
    def of_config(cls, tokenizer: Any, config: dict[str, Any]) -> Self:
        """A random network of these sizes."""
        return cls(tokenizer, **config)

    def scores(self, query: Tokens, document: Tokens) -> Tensor:
        """Scores [n] of n pairs, in float32 from the cosines on."""
        vectors = self._contextual(query, 0), self._contextual(document, DOCUMENT_POSITION)
        with torch.autocast(query.ids.device.type, enabled=False):
            left, right = (normalize(x.float(), dim=-1) for x in vectors)
            kernels = self.pooling(left @ right.mT, self._words(query), self._words(document))
            return kernels @ self.weights.float()

    def _words(self, tokens: Tokens) -> Tensor:
        """Where the tokens [n, L] are words."""
        return tokens.mask & (tokens.ids != self.tokenizer.cls_token_id) & (tokens.ids != self.tokenizer.sep_token_id)

    def _contextual(self, tokens: Tokens, first: int) -> Tensor:
        """Vectors [n, L, d] of the tokens, of which the first is at position ``first``."""
        embedded = self.embeddings(tokens.ids)
        placed = embedded + sinusoids(tokens.ids.shape[1], self.dimension, first).to(embedded)
        context = self.context(placed.transpose(0, 1), src_key_padding_mask=~tokens.mask).transpose(0, 1)
        return self.mix * embedded + (1 - self.mix) * context


def sinusoids(length: int, dimension: int, first: int = 0) -> Tensor:
    """Sines and cosines [length, dimension] of positions from ``first`` on (Vaswani et al. 2017)."""
    rates = torch.exp(torch.arange(0, dimension, 2) * (-math.log(10000.0) / dimension))
    angles = torch.arange(first, first + length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def word_embeddings(path: Any, tokenizer: Any) -> Tensor:
    """The input embeddings [V, d] of a saved model, scaled to rows of length √d on average.

    That is the length of random ones, of the positions and of what a layer norm puts out; a BERT's own are a tenth of
    it, and their words would drown in the mix. Raises `InputError` when the tokenizer knows more words.
    """
    from transformers import AutoModel

    weights = AutoModel.from_pretrained(str(path)).get_input_embeddings().weight.detach().float()
    if len(weights) < len(tokenizer):
        raise InputError(f"{path}: {len(weights)} word embeddings, but its tokenizer has {len(tokenizer)} words")
    weights = weights[: len(tokenizer)]
    return weights * (math.sqrt(weights.shape[1]) / weights.norm(dim=1).mean())
