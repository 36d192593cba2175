"""The masked-LM head that SPLADE pools: whether a checkpoint has one, a start where it has not, smaller logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.errors import InputError, RecipeError, first

ACTIVE = 300
"""The active terms of a document after `start_head`, where the vocabulary is twice as large: 1 % of BERT's."""
_LINEAR = 5.0
"""From where on GELU is the identity, to 2e-6."""
_TEXTS_AT_ONCE = 8


def has_head(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` has a masked-LM head, by the names of its weights.

    transformers would make a missing one out of random numbers. Raises `InputError` when the model is not one that
    predicts masked words, or has no file of weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    config = AutoConfig.from_pretrained(folder)
    try:
        with torch.device("meta"):
            network = AutoModelForMaskedLM.from_config(config)
    except ValueError as error:
        raise InputError(
            f"{folder}: a {config.model_type} does not predict masked words; give a masked language model, "
            "or set echo: true for one that predicts the next word"
        ) from error
    base = f"{network.base_model_prefix}."
    untied = dict(network.named_parameters())  # a tied weight is there once, under its name in the base
    needed = {name for name, weight in untied.items() if not name.startswith(base) and weight.dim() == 2}
    return needed <= _weight_names(folder)


def start_head(network: Any, tokenizer: Any, texts: Sequence[str], length: int | None = None) -> float:
    """Gives a masked LM without a trained head the tied word embeddings as head, in place; the mean active terms.

    The transform before the output becomes the identity up to its layer norm, so that the logit of a term is the dot
    product of a normalised token vector with the term's word embedding. The output bias takes from each term its mean
    over ``texts`` of the largest logit of a text (what a term has in every text tells nothing), and a constant that
    leaves `ACTIVE` of the vocabulary above zero. Raises `RecipeError` for a head of another form.
    """
    import torch

    dense, norm, output = _parts(network)
    with torch.no_grad():
        dense.weight.copy_(torch.eye(len(dense.weight)))
        if dense.bias is not None:  # a constant that the layer norm takes away again
            dense.bias.fill_(_LINEAR + _reach(network, tokenizer, texts[:_TEXTS_AT_ONCE], length))
        norm.weight.fill_(1.0)
        if norm.bias is not None:
            norm.bias.zero_()
        output.bias.zero_()
        largest = _largest_logits(network, tokenizer, texts, length)
        mean = largest.mean(dim=0)
        above = largest - mean
        needed = float(np.quantile(above.numpy(), 1 - min(0.5, ACTIVE / mean.numel())))
        output.bias.copy_(-mean - needed)
    return float((above > needed).sum(dim=1).float().mean())


def divide_head(network: Any, divisor: float) -> None:
    """Divides the logits of a masked LM by ``divisor``, in place, and leaves its (tied) word embeddings as they are.

    The heads of ModernBERT and Ettin give logits so large that SPLADE collapses on them; 16 helps (arXiv 2606.18811).
    """
    import torch

    _, norm, output = _parts(network)
    with torch.no_grad():
        for weight in (norm.weight, norm.bias, output.bias):
            if weight is not None:
                weight /= divisor


def _parts(network: Any) -> tuple[Any, Any, Any]:
    """The square layer, the layer norm and the output of a head: the parts outside the base model."""
    from torch.nn import LayerNorm, Linear

    base = f"{network.base_model_prefix}."
    outside = [module for name, module in network.named_modules() if not f"{name}.".startswith(base)]
    output = network.get_output_embeddings()
    dense = [m for m in outside if isinstance(m, Linear) and m is not output and m.in_features == m.out_features]
    norms = [m for m in outside if isinstance(m, LayerNorm)]
    if len(dense) != 1 or len(norms) != 1 or output is None or output.bias is None:
        raise RecipeError(
            f"the head of a {type(network).__name__} is not a square layer, a layer norm and an output with a bias "
            f"({len(dense)} layers, {len(norms)} norms): take a checkpoint that was trained to predict masked words"
        )
    return dense[0], norms[0], output


def _reach(network: Any, tokenizer: Any, texts: Sequence[str], length: int | None) -> float:
    """The largest number in the token vectors of ``texts``, whatever its sign."""
    features = _features(network, tokenizer, texts, length)
    return float(network.base_model(**features).last_hidden_state.abs().max())


def _largest_logits(network: Any, tokenizer: Any, texts: Sequence[str], length: int | None) -> Any:
    """Each text's largest logit of each term [n, V]."""
    import torch

    training = network.training
    network.eval()
    rows = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        features = _features(network, tokenizer, texts[start : start + _TEXTS_AT_ONCE], length)
        logits = network(**features).logits.float()
        padding = features["attention_mask"] == 0
        rows.append(logits.masked_fill(padding[:, :, None], float("-inf")).amax(dim=1).cpu())
    network.train(training)
    return torch.cat(rows)


def _features(network: Any, tokenizer: Any, texts: Sequence[str], length: int | None) -> Any:
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(list(texts), **options).to(network.device)


def _weight_names(folder: Path) -> set[str]:
    """The names of the weights in a checkpoint: one file or several, safetensors or a torch pickle."""
    import torch
    from safetensors import safe_open

    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"])
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="np") as file:
            return set(file.keys())
    if (folder / "pytorch_model.bin").is_file():
        return set(torch.load(folder / "pytorch_model.bin", mmap=True, weights_only=True))
    names = sorted(path.name for path in folder.iterdir())
    raise InputError(f"{folder}: no model.safetensors or pytorch_model.bin (there is {first(names)})")
