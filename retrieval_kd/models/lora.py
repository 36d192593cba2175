"""Low-rank adapters (Hu et al. 2021) on a transformer: put on, kept in checkpoints, merged away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from retrieval_kd.errors import MissingExtraError, RecipeError
from retrieval_kd.recipe import Section

if TYPE_CHECKING:
    from torch import nn

TRAINED = "trained.pt"
"""The file of a checkpoint that holds what training changes: adapters and heads, not the base's weights."""


class Lora(Section):
    """A recipe's ``lora:``: low-rank adapters in place of training all weights; merged into the weights at the end."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    modules: list[str] | Literal["all-linear"] = "all-linear"


def add_lora(network: Any, settings: Lora) -> None:
    """Freezes a transformer and puts adapters on its linear layers, in place.

    What remains trainable: the adapters and a classification head. ``modules`` are names of linear layers
    (``q_proj``), or ``all-linear``. Raises `MissingExtraError` without peft, `RecipeError` when no layer has one of
    the names.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise MissingExtraError("lora: needs the package 'peft'", "lora") from error

    linear = {name for name, module in network.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    head = {name for name in linear if not _in_backbone(network, name)}
    # a pooler that nothing reads would get adapters without a gradient
    usable = {name for name in linear - head if "pooler" not in name}
    wanted = {name for name in usable if settings.modules == "all-linear" or _own_name(name) in settings.modules}
    if not wanted:
        raise RecipeError(
            f"lora.modules: {settings.modules}: {type(network).__name__} has no such linear layer "
            f"(it has {', '.join(sorted({_own_name(name) for name in usable}))})"
        )
    network.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=sorted(wanted),
        )
    )
    if network.get_output_embeddings() is None:  # else the head predicts words, and stays as it is
        for name in head:
            network.get_submodule(name).requires_grad_(True)


def merge_lora(network: Any) -> None:
    """Adds the adapters to the weights they belong to and takes them off, in place: a plain model remains."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge(safe_merge=True)
        setattr(network.get_submodule(name.rpartition(".")[0]), _own_name(name), module.get_base_layer())
    del network.peft_config
    network._hf_peft_config_loaded = False
    network.requires_grad_(True)


def with_small_checkpoints(trainer: type[Any]) -> type[Any]:
    """A trainer (of transformers, sentence-transformers) whose checkpoints hold only what is trained.

    Its own would name the base model by path, and load from there what the recipe has changed since (fewer layers,
    a new head).
    """
    import torch

    class LoraTrainer(trainer):
        """Saves and loads trainable parameters alone."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {name: weights.detach() for name, weights in _trained(self.model).items()}
            torch.save(trained, folder / TRAINED)

        def _load_from_checkpoint(self, checkpoint_path: str) -> None:
            saved = torch.load(Path(checkpoint_path) / TRAINED, weights_only=True, map_location="cpu")
            trained = _trained(self.model)
            if saved.keys() != trained.keys():
                raise RecipeError(f"{checkpoint_path}: made with other adapters; remove it to begin again")
            with torch.no_grad():
                for name, weights in trained.items():
                    weights.copy_(saved[name])

    return LoraTrainer


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weights for name, weights in model.named_parameters() if weights.requires_grad}


def _in_backbone(network: Any, name: str) -> bool:
    return network.base_model is network or name.startswith(network.base_model_prefix + ".")


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]
