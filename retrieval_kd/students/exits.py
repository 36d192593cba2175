"""Multi-exit self-distillation: the same losses after some of the layers, and early exits that learn from the last.

An exit is the model cut off after some layers, with what follows the transformer shared; it can be served alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrieval_kd.errors import RecipeError
from retrieval_kd.losses.on_scores import kl_divergence
from retrieval_kd.models.layers import keep_layers
from retrieval_kd.students.bi_encoder import at_least_float32

if TYPE_CHECKING:
    from retrieval_kd.students.objective import Objective

_FINAL_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f")
"""What decoders and ModernBERT call the normalisation after their last layer, which an early exit needs too."""


class MultiExitLoss(torch.nn.Module):
    """The objective at each exit, and KL from the last exit's scores to each earlier one's.

    Of E exits, the last layer included, exit e = 1 … E weighs e/E (ModularStarEncoder trains its exits jointly). The
    KL is over all documents of the batch, and no gradient of it reaches the last exit's scores.
    """

    def __init__(self, objective: Objective, exits: Sequence[int], weight: float) -> None:
        super().__init__()
        self.objective = objective
        self.exits = sorted(exits)
        self.weight = weight

    @property
    def model(self) -> Any:
        """The model that the objective encodes with."""
        return self.objective.model

    def forward(self, features: Any, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """The last exit's losses by their keys, and ``exit-2/KEY`` and ``exit-2/last`` of an exit after two layers."""
        student: Any = self.objective.student
        queries, documents = (
            at_least_float32(student.in_parts(lambda part: embed_exits(self.model, part, self.exits), column)).unbind(1)
            for column in features
        )
        with torch.autocast(queries[0].device.type, enabled=False):
            return self._losses(student, queries, documents, labels)

    def _losses(self, student: Any, queries: Any, documents: Any, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        final = student.compare(queries[-1], documents[-1], self.objective.extra).detach()
        everything = torch.ones_like(final, dtype=torch.bool)
        losses = dict(self.objective.compute_loss_from_embeddings([queries[-1], documents[-1]], labels))
        for i, layers in enumerate(self.exits):
            share = (i + 1) / (len(self.exits) + 1)
            here = self.objective.compute_loss_from_embeddings([queries[i], documents[i]], labels)
            losses |= {f"exit-{layers}/{key}": share * value for key, value in here.items()}
            if self.weight:
                scores = student.compare(queries[i], documents[i], self.objective.extra)
                losses[f"exit-{layers}/last"] = self.weight * kl_divergence(scores, final, everything)
        return losses


def embed_exits(model: Any, features: dict[str, Any], exits: Sequence[int]) -> Tensor:
    """Embeddings [n, exits + 1, d] after each of ``exits`` layers and, last, of the whole model."""
    modules = list(getattr(model, "module", model))  # bare of the wrapper that other processes need
    network = modules[0].auto_model
    asked = network.config.output_hidden_states
    network.config.output_hidden_states = True
    try:
        out = model(features)
    finally:
        network.config.output_hidden_states = asked
    states = out["all_layer_embeddings"]
    norm = next((getattr(network, name) for name in _FINAL_NORMS if hasattr(network, name)), torch.nn.Identity())
    found = []
    for layers in exits:
        here = {**features, "token_embeddings": norm(states[layers])}
        for module in modules[1:]:
            here = module(here)
        found.append(here["sentence_embedding"])
    return torch.stack([*found, out["sentence_embedding"]], dim=1)


def exit_of(model: Any, layers: int) -> Any:
    """A copy of ``model`` that ends after ``layers`` layers."""
    cut = copy.deepcopy(model)
    keep_layers(cut[0].auto_model, range(layers))
    return cut


def check_exits(model: Any, exits: Sequence[int]) -> None:
    """Raises `RecipeError` for an exit the model cannot have: a wrong number of layers, or another way to end."""
    depth = int(model[0].auto_model.config.num_hidden_layers)
    wrong = [layers for layers in exits if not 1 <= layers < depth]
    if wrong or len(set(exits)) < len(exits):
        raise RecipeError(f"exits: {list(exits)}: give different numbers of layers, from 1 to {depth - 1}")
    training = model.training
    model.eval()
    with torch.no_grad():
        features = model.preprocess(["Which texts are alike?"])
        embeddings = embed_exits(model, dict(features), exits)
        for i, layers in enumerate(exits):
            alone = exit_of(model, layers)(dict(features))["sentence_embedding"]
            if not torch.allclose(alone, embeddings[:, i], atol=1e-4):
                raise RecipeError(
                    f"exits: {type(model[0].auto_model).__name__} ends in a way that is not known here: cut after "
                    f"{layers} layers it gives other vectors than its layer {layers}"
                )
    model.train(training)


def save_exits(model: Any, exits: Sequence[int], folder: Path) -> None:
    """Writes each exit as a sentence-transformers directory ``exit-LAYERS`` in ``folder``."""
    for layers in exits:
        exit_of(model, layers).save_pretrained(str(folder / f"exit-{layers}"), create_model_card=False)
