"""Opening a cross-encoder for use: checked, with the length that it reads and its scores as one tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.errors import InputError
from retrieval_kd.models.encoder import new_parts_expected, quiet_loading
from retrieval_kd.models.load import ModelSource

if TYPE_CHECKING:
    from torch import Tensor, nn

OWN_NETWORKS = frozenset({"retrieval_kd.models.prettr.PreTTR", "retrieval_kd.models.tk.TK"})
"""The modules of this package that a ``CrossEncoder`` may consist of (see `PairReranker`)."""


def load_cross_encoder(
    source: ModelSource,
    *,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    own_networks: bool = False,
) -> Any:
    """The ``CrossEncoder`` of ``source`` in evaluation mode, on ``device`` (a GPU where there is one).

    With ``own_networks`` it may consist of a network of this package. Raises `InputError` for what cannot rank pairs:
    not one output, a language model that answers a prompt, no trained head, no padding token, or fewer positions than
    ``max_length``.
    """
    import torch
    from sentence_transformers import CrossEncoder

    if _own_network(source.path):
        if not own_networks:
            raise InputError(
                f"model '{source.name}' has a network of retrieval_kd's own: it runs in torch and cannot be exported "
                "(in a teacher's recipe: backend: torch)"
            )
        if max_length is not None:
            raise InputError(
                f"model '{source.name}' has a length for queries and one for documents; "
                "omit max_length (--set max_length=null)"
            )
        with quiet_loading():
            return CrossEncoder(
                str(source.path),
                device=device,
                trust_remote_code=True,  # of this package: see `_own_network`
                activation_fn=torch.nn.Identity(),
                model_kwargs={"dtype": getattr(torch, dtype)},
            ).eval()
    with quiet_loading():
        model = CrossEncoder(
            str(source.path), max_length=max_length, device=device, model_kwargs={"dtype": getattr(torch, dtype)}
        )
    model.eval()
    _refuse(model, source, max_length)
    return model


def pair_limit(model: Any) -> int | None:
    """Tokens of a pair that the model reads; None without a limit (tokenizers then say a huge number)."""
    limit = min((limit for limit in (model.max_seq_length, _positions(model)) if limit is not None), default=None)
    return None if limit is None or limit > 10**9 else int(limit)


def query_prompt(model: Any) -> str:
    """What ``CrossEncoder.predict`` would put before each query."""
    return (model.prompts or {}).get(model.default_prompt_name) or ""


def scores_only(model: Any) -> nn.Module:
    """A module that gives a ``CrossEncoder``'s scores [B, 1] as a tensor instead of in a dictionary."""
    import torch

    class ScoresOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            scores: Tensor = self.model(dict(features))["scores"]
            return scores

    return ScoresOnly()


def _own_network(path: Path) -> bool:
    """Whether a saved model consists of one network of this package and nothing else."""
    file = path / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return len(modules) == 1 and modules[0].get("type") in OWN_NETWORKS


def _refuse(model: Any, source: ModelSource, length: int | None) -> None:
    name = f"model '{source.name}'"
    if model.num_labels != 1:
        raise InputError(
            f"{name} has {model.num_labels} outputs; a cross-encoder that ranks has one "
            "(fine-tune one with: retrieval-kd train students/cross-encoder-pydocs.yaml …)"
        )
    if model[0].transformer_task != "sequence-classification" or "message" in model[0].modality_config:
        raise InputError(f"{name} is a language model that is asked for an answer; use kind: llm-pointwise")
    if missing := _missing_weights(type(model[0].model), source.path):
        raise InputError(
            f"{name} is no trained cross-encoder: its files lack {len(missing)} weights (first: {missing[0]}), "
            "which would be random; fine-tune it (retrieval-kd train students/cross-encoder-pydocs.yaml …)"
        )
    if model.tokenizer.pad_token_id is None:
        raise InputError(
            f"{name} has no padding token, so that its pairs cannot share a batch; save a copy whose tokenizer "
            "has a pad_token and whose config has its pad_token_id"
        )
    positions = _positions(model)
    if length is not None and positions is not None and length > positions:
        raise InputError(f"{name} has {positions} positions, but max_length is {length}; set max_length={positions}")


def _positions(model: Any) -> int | None:
    """How many tokens a model with a table of positions can read; None when it has no table."""
    import torch

    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding index.
            return int(table.num_embeddings) - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def _missing_weights(network: Any, path: Path) -> list[str]:
    """The weights of a ``network`` class that a directory does not hold; nothing is loaded to find out."""
    with new_parts_expected():
        _, report = network.from_pretrained(path, num_labels=1, output_loading_info=True, device_map={"": "meta"})
    return sorted(report["missing_keys"])
