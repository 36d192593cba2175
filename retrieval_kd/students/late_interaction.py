"""The late-interaction student (ColBERT, XTR): a vector a token, compared by MaxSim."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.errors import InputError, RecipeError, first
from retrieval_kd.recipe import Section
from retrieval_kd.students.base import StudentRecipe
from retrieval_kd.students.bi_encoder import BiEncoderStudent

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
    from torch import Tensor

_ELEMENTS = 25_000_000
"""Numbers that a block of token similarities may hold (100 MB)."""
_TOKENS = {"module_input_name": "token_embeddings"}


class QueryExpansion(Section):
    """Mask tokens that fill a short query up to ``length`` tokens and are compared like words (Khattab 2020).

    ``min`` leaves longer queries as they are, ``fixed`` cuts them. With ``attend`` the words see the mask tokens.
    """

    length: int = Field(default=32, ge=4)
    strategy: Literal["min", "fixed"] = "min"
    attend: bool = False


class TokenPooling(Section):
    """Similar token vectors of a document become one, their mean: about 1/``factor`` of them are left (Clavié 2024).

    It is a module of the saved model. While training documents are whole, unless ``in_training``.
    """

    factor: float = Field(default=2.0, gt=1)
    in_training: bool = False


class LateInteractionStudent(BiEncoderStudent):
    """A `MultiVectorEncoder`; texts are embedded as [n, T, d] tensors with zero rows for tokens not compared."""

    class Recipe(StudentRecipe):
        """Keys of ``kind: late-interaction``; a key left out is the base's own where it has one.

        ``scoring`` is what losses see: ``maxsim``, its ``mean`` over query tokens, or ``xtr`` (Lee et al. 2023), where
        only the ``top_k`` document tokens of the whole batch count for each query token. ``special_tokens`` are markers
        in the prompts, such as ``[Q]``, that become one token each.
        """

        kind: Literal["late-interaction"]
        dimension: int | None = Field(default=None, ge=1)
        similarity: Literal["cosine", "dot"] | None = None
        skip_punctuation: bool | None = None
        query_expansion: QueryExpansion | None = None
        prompts: dict[Literal["query", "document"], str] = Field(default_factory=dict)
        special_tokens: list[str] = Field(default_factory=list)
        scoring: Literal["maxsim", "mean", "xtr"] = "maxsim"
        top_k: int | None = Field(default=None, ge=1)
        token_pooling: TokenPooling | None = None

        @model_validator(mode="after")
        def _possible(self) -> LateInteractionStudent.Recipe:
            for term in self.losses:
                if term.needs & {"vectors", "relations"} and "batch" not in term.needs:
                    raise ValueError(f"a late-interaction student cannot learn '{term.kind}': a text has many vectors")
            if (self.top_k is not None) != (self.scoring == "xtr"):
                raise ValueError("'scoring: xtr' and top_k (256, say) belong together")
            length = self.query_expansion.length if self.query_expansion else 0
            if self.query_length is not None and self.query_length < length:
                raise ValueError(f"query_length: {self.query_length} is less than query_expansion.length: {length}")
            return self

        @property
        def over_batch(self) -> bool:
            """Whether a query must be compared with all documents of the batch."""
            return self.scoring == "xtr" or any("batch" in term.needs for term in self.losses)

    recipe: Recipe

    def start(self) -> BaseModel:
        """The base as a `MultiVectorEncoder`: as it is when it is one, else its transformer and a new projection."""
        import torch
        from sentence_transformers import MultiVectorEncoder

        from retrieval_kd.models.layers import keep_layers
        from retrieval_kd.models.load import find_model

        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        path = find_model(recipe.base).path
        similarity = "meanmaxsim" if recipe.scoring == "mean" else "maxsim"
        if _is_multi_vector(path):
            model = MultiVectorEncoder(str(path))
            self._refuse_changes_of(model, similarity)
        else:
            network, prompts = _transformer_of(path)
            model = MultiVectorEncoder(
                modules=self._new_modules(network), similarity_fn_name=similarity, prompts=prompts
            )
        if recipe.layers is not None:
            keep_layers(model[0].auto_model, recipe.layers)
        if recipe.prompts:
            model.prompts = {**model.prompts, **recipe.prompts}
        _add_tokens(model, recipe.special_tokens)
        self._set_lengths(model[0])
        if recipe.token_pooling and recipe.token_pooling.in_training:
            model.append(self._pooling(model))
        return model

    def _new_modules(self, network: Transformer) -> list[Any]:
        import torch
        from sentence_transformers.base.modules import Dense, Normalize
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        width, identity = int(network.get_embedding_dimension()), torch.nn.Identity()
        projection = Dense(width, self.recipe.dimension or 128, bias=False, activation_function=identity, **_TOKENS)
        # rows at right angles keep the base's similarities as far as the dimension allows
        torch.nn.init.orthogonal_(projection.linear.weight)
        normalize = [] if self.recipe.similarity == "dot" else [Normalize(**_TOKENS)]
        words = "" if self.recipe.skip_punctuation is False else string.punctuation
        known = network.tokenizer.get_vocab()
        skipped = [word for word in words if word in known]
        return [network, projection, *normalize, MultiVectorMask(skiplist_words=skipped)]

    def _refuse_changes_of(self, base: Any, similarity: str) -> None:
        from sentence_transformers.multi_vector_encoder.modules import BaseTokenPooling

        name = f"the base '{self.recipe.base}' is a late-interaction model already and"
        keys = ("dimension", "similarity", "skip_punctuation")
        if given := [key for key in keys if getattr(self.recipe, key) is not None]:
            raise RecipeError(f"{', '.join(given)}: {name} keeps its projection; leave the key out")
        if self.recipe.token_pooling and any(isinstance(module, BaseTokenPooling) for module in base):
            raise RecipeError(f"token_pooling: {name} pools its tokens; leave the key out")
        if base.similarity_fn_name != similarity:
            own = "mean" if base.similarity_fn_name == "meanmaxsim" else "maxsim"
            raise RecipeError(f"scoring: {name} compares by {base.similarity_fn_name}; set scoring={own}")

    def _set_lengths(self, network: Transformer) -> None:
        expansion = self.recipe.query_expansion
        if expansion:
            network.query_expansion = None
        for key in ("query_length", "document_length"):
            if (length := getattr(self.recipe, key)) is not None:
                setattr(network, key, length)
        if expansion:
            try:
                network.query_expansion = expansion.model_dump()
            except ValueError as error:
                raise RecipeError(f"query_expansion: {error}") from error

    def _pooling(self, model: Any) -> HierarchicalTokenPooling:
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

        assert self.recipe.token_pooling is not None
        unit = any(isinstance(module, Normalize) for module in model)
        return HierarchicalTokenPooling(self.recipe.token_pooling.factor, normalize_embeddings=unit)

    def _pooling_afterwards(self, model: Any) -> HierarchicalTokenPooling | None:
        """The pooling that the model gets only when it is saved."""
        pooling = self.recipe.token_pooling
        return self._pooling(model) if pooling and not pooling.in_training else None

    def trainer(self) -> tuple[type[Any], type[Any]]:
        """`MultiVectorEncoderTrainer`."""
        from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

        return MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

    def embed(self, model: Any, features: dict[str, Any]) -> Tensor:
        """Token vectors [n, T, d] of n texts; rows of tokens that the model does not compare are zero.

        Raises `InputError` for a text without any token to compare.
        """

        def run(part: dict[str, Any]) -> Tensor:
            output = model(part, task=part["task"])
            mask = output["attention_mask"].bool()
            if not bool(mask.any(dim=1).all()):
                raise InputError(f"a {part['task']} of the batch has no token that the model compares")
            vectors: Tensor = output["token_embeddings"].masked_fill(~mask.unsqueeze(2), 0.0)
            return vectors

        return self.in_parts(run, features)

    def token_counts(self, features: dict[str, Any]) -> Tensor:
        """Tokens [n] of each text; those that fill up a query count although words may not attend to them."""
        counts = super().token_counts(features)
        if "query_expansion_positions" in features:
            counts = (features["attention_mask"].bool() | features["query_expansion_positions"]).sum(dim=1)
        return counts

    def compare(self, queries: Tensor, documents: Tensor, parameters: Any) -> Tensor:
        """MaxSim, its mean over query tokens, or XTR's score [B, U]; blocks of documents at a time."""
        from sentence_transformers.multi_vector_encoder.scoring import xtr_scores
        from sentence_transformers.util.similarity import maxsim

        if self.recipe.top_k is not None:
            scores: Tensor = xtr_scores(queries, documents.unsqueeze(1), top_k=self.recipe.top_k)
        else:
            mean = self.recipe.scoring == "mean"
            scores = maxsim(queries, documents, chunk_elements=_ELEMENTS, length_normalize=mean)
        return scores

    def group_scores(self, queries: Tensor, documents: Tensor, column: Tensor, present: Tensor) -> Tensor | None:
        """The groups' scores [B, N] pair by pair; None when every query must be compared with every document."""
        from sentence_transformers.util.similarity import maxsim_pairwise

        if self.recipe.over_batch:
            return None
        rows = present.nonzero()[:, 0]
        mean = self.recipe.scoring == "mean"
        pairs = maxsim_pairwise(
            queries[rows], documents[column[present]], chunk_elements=_ELEMENTS, length_normalize=mean
        )
        return pairs.new_zeros(present.shape).masked_scatter(present, pairs)

    def development_scores(self, model: Any, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """The model's similarities [queries, documents], of pooled documents where the saved model pools."""
        q = model.encode_query(list(queries), show_progress_bar=False)
        pooling = self._pooling_afterwards(model)
        d = model.encode_document(list(documents), show_progress_bar=False, token_pooling=pooling)
        scores = model.similarity(q, d, chunk_elements=_ELEMENTS)
        return np.asarray(scores.cpu().numpy(), dtype=np.float32)

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model, with its token pooling."""
        pooling = self._pooling_afterwards(model)
        if pooling is not None:
            model.append(pooling)
        super().save(model, folder)

    def settings(self, parameters: dict[str, float]) -> dict[str, Any]:
        """The similarity for searching, what losses saw, and the token pooling's factor."""
        recipe = self.recipe
        return {
            "similarity": "meanmaxsim" if recipe.scoring == "mean" else "maxsim",
            "scoring": recipe.scoring,
            "token_pooling": recipe.token_pooling.factor if recipe.token_pooling else None,
        }

    def notes(self) -> list[str]:
        """How it was compared while training, where that differs from searching."""
        notes = []
        if self.recipe.top_k is not None:
            notes.append(
                f"Trained with XTR's score over the {self.recipe.top_k} best document tokens of a batch; "
                "otherwise it is compared by MaxSim."
            )
        if (pooling := self.recipe.token_pooling) is not None:
            when = "in training too" if pooling.in_training else "after training on all of them"
            notes.append(f"Documents keep about one of {pooling.factor:g} token vectors ({when}).")
        return notes


def _is_multi_vector(path: Path) -> bool:
    """Whether a directory holds a model with a trained projection of tokens (also PyLate's and Stanford's)."""
    from retrieval_kd.models.encoder import saved_as

    if saved_as(path) in ("MultiVectorEncoder", "ColBERT"):
        return True
    config = path / "config.json"
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    return "HF_ColBERT" in (architectures or [])


def _transformer_of(path: Path) -> tuple[Transformer, dict[str, str]]:
    """The first module of a sentence-transformers directory and its prompts, or a plain transformer without any."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    if not (path / "modules.json").is_file():
        return Transformer(str(path)), {}
    model = SentenceTransformer(str(path))
    if not isinstance(model[0], Transformer):
        raise RecipeError(f"base: {path} begins with a {type(model[0]).__name__}, not with a transformer")
    return model[0], dict(model.prompts)


def _add_tokens(model: Any, tokens: Sequence[str]) -> None:
    """Makes each string one token, with a new row of the embedding table where the vocabulary lacks it."""
    from transformers import AddedToken

    if not tokens:
        return
    if unused := [token for token in tokens if not any(token in prompt for prompt in model.prompts.values())]:
        raise RecipeError(f"special_tokens: {first(unused)}: in no prompt")
    added = [AddedToken(token, normalized=False, special=True) for token in tokens]
    model.tokenizer.add_tokens(added, special_tokens=True)
    network = model[0].auto_model
    if len(model.tokenizer) > network.get_input_embeddings().num_embeddings:
        network.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
