"""Cutting a transformer down to some of its layers, the usual start of a shallow student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retrieval_kd.errors import RecipeError, first


def keep_layers(network: Any, layers: Sequence[int]) -> None:
    """Keeps only ``layers`` (counted from 0, in the given order) of a transformers encoder, in place.

    Raises `RecipeError` for a layer the model does not have, a model whose stack of layers is not found, or a choice
    that its architecture cannot load again (ModernBERT builds its first layer differently: keep 0 in front).
    """
    import torch
    from torch.nn import ModuleList

    depth = int(network.config.num_hidden_layers)
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong or not layers:
        raise RecipeError(f"layers: {list(layers)}: the model has layers 0 to {depth - 1}")
    stacks = [
        (parent, name)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, ModuleList) and len(child) == depth
    ]
    if len(stacks) != 1:
        raise RecipeError(f"layers: cannot tell which part of {type(network).__name__} is its stack of {depth} layers")
    parent, name = stacks[0]
    stack = getattr(parent, name)
    setattr(parent, name, ModuleList([stack[layer] for layer in layers]))
    network.config.num_hidden_layers = len(layers)
    types = getattr(network.config, "layer_types", None)
    if types:
        network.config.layer_types = [types[layer] for layer in layers]
    with torch.device("meta"):
        rebuilt = type(network)(network.config).state_dict().keys()
    if differing := sorted(rebuilt ^ network.state_dict().keys()):
        raise RecipeError(
            f"layers: {list(layers)}: {type(network).__name__} cannot be loaded again with these layers "
            f"({first(differing)} would be left over or missing); try to keep layer 0 in front"
        )
