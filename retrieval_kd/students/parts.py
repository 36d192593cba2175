"""Running a network over a batch in parts of similar length, because padding costs as much as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint


def in_parts(
    run: Callable[[dict[str, Any]], Tensor], features: dict[str, Any], lengths: Tensor, at_once: int, *, recompute: bool
) -> Tensor:
    """What ``run`` gives for n texts whose tokens are in ``features``, ``at_once`` at a time; results in order.

    ``lengths`` [n] are the tokens of each text that the network must see; a part is cut at its longest. Results
    [m, width, …] of a part are padded with zeros to the widest. With ``recompute`` a part keeps no activations and is
    run again in the backward pass (GradCache, Gao et al. 2021: the same gradients in the memory of one part).
    """
    left = not bool(features["attention_mask"][:, 0].all())  # decoders are padded on the left
    order = lengths.argsort(stable=True)
    sequence = features["attention_mask"].shape[1]
    tensors = {key: value for key, value in features.items() if torch.is_tensor(value)}
    others = {key: value for key, value in features.items() if key not in tensors}
    results = []
    for part in order.split(at_once):
        width = int(lengths[part].max())
        tokens = slice(sequence - width, None) if left else slice(width)
        inputs = {
            key: value[part, tokens] if value.dim() > 1 and value.shape[1] == sequence else value[part]
            for key, value in tensors.items()
        }
        if recompute and torch.is_grad_enabled():
            results.append(checkpoint(lambda x: run({**others, **x}), inputs, use_reentrant=False))
        else:
            results.append(run({**others, **inputs}))
    if results[0].dim() > 2 or results[0].shape[1:] != results[-1].shape[1:]:
        widest = max(result.shape[1] for result in results)
        results = [pad(r, [0, 0] * (r.dim() - 2) + [0, widest - r.shape[1]]) for r in results]
    return torch.cat(results)[order.argsort()]
