"""A causal language model that reads a text twice and predicts from the second copy (Echo-Mistral-SPLADE).

In the second copy every token has seen the whole text, which a causal model otherwise never has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from sentence_transformers.base.modules import Transformer

from retrieval_kd.errors import InputError


class EchoTransformer(Transformer):
    """A transformer module for ``SpladePooling``: the logits of the second copy's tokens, [n, m, V] for m tokens.

    Doshi et al. 2024, arXiv 2408.11119. Lengths (``max_seq_length``, ``query_length``, ``document_length``) are those
    of one copy. stock sentence-transformers loads a saved model with ``trust_remote_code=True`` where this package is
    installed.
    """

    @classmethod
    def of(cls, folder: str, **lengths: int | None) -> Self:
        """The causal language model in ``folder``, its output layer tied to its word embeddings.

        Raises `InputError` for a model that does not predict the next word.
        """
        try:
            module = cls(
                folder,
                transformer_task="text-generation",
                modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
                module_output_name="token_embeddings",
                **lengths,
            )
        except ValueError as error:
            if "AutoModelForCausalLM" not in str(error):
                raise
            raise InputError(f"{folder}: echo needs a causal language model; this one cannot predict words") from error
        network = module.model
        network.get_output_embeddings().weight = network.get_input_embeddings().weight
        network.config.tie_word_embeddings = True
        if module.tokenizer.pad_token_id is None:
            module.tokenizer.pad_token = module.tokenizer.eos_token
        return module

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Token ids: the tokenizer's first special token where it has one, the prompted text, and that again."""
        texts = [f"{prompt or ''}{text}" for text in inputs]
        start = [token for token in self.tokenizer("")["input_ids"] if token == self.tokenizer.bos_token_id]
        limit = getattr(self, f"{kwargs.get('task')}_length", None) or self.max_seq_length
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=limit is not None,
            max_length=limit - len(start) if limit is not None else None,
        )["input_ids"]
        echoed = [[*start, *row, *row] or [self.tokenizer.pad_token_id] for row in rows]
        padded = self.tokenizer.pad({"input_ids": echoed}, padding_side="left", return_tensors="pt")
        return {**padded, "modality": "text"}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """``token_embeddings`` [n, m, V] and the ``attention_mask`` [n, m] that goes with them."""
        mask = features["attention_mask"]
        width = max(1, mask.shape[1] // 2)  # the second copy of the longest text; texts end at the last column
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        features = super().forward(features, logits_to_keep=width, position_ids=positions, **kwargs)
        own = mask.sum(dim=1, keepdim=True) // 2
        from_end = mask.new_tensor(range(width, 0, -1))
        features["attention_mask"] = (from_end <= own).to(mask.dtype)
        return features
