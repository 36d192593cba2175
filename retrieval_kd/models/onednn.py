"""Linear layers by oneDNN instead of MKL, in float32 on a CPU: for inference, and for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def use_onednn(model: nn.Module) -> int:
    """The number of linear layers of ``model`` that oneDNN computes from now on; 0 where torch cannot.

    On x86 torch multiplies float32 matrices with MKL, which leaves an AMD processor's AVX-512 unused. oneDNN gives the
    same numbers up to rounding, about twice as fast there. The weights are repacked in place: the model cannot be
    trained, saved or exported afterwards.
    """
    import torch

    operators = torch.ops.mkldnn
    if not _usable() or not hasattr(operators, "_reorder_linear_weight"):
        return 0

    class OneDNNLinear(torch.nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = operators._reorder_linear_weight(linear.weight.detach())
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = operators._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return result

    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _replaceable(child)
    ]
    for parent, name, child in linears:
        setattr(parent, name, OneDNNLinear(child))
    return len(linears)


@contextmanager
def onednn_training(model: nn.Module) -> Iterator[int]:
    """The number of linear layers of ``model`` that oneDNN computes inside the block, forwards and backwards.

    The layers keep their weights and their place, and are plain ``torch.nn.Linear`` again afterwards. Under autocast
    they do what they always do: bfloat16 is oneDNN's already.
    """
    linears = [module for module in model.modules() if _replaceable(module)] if _usable() else []
    for linear in linears:
        linear.__class__ = _trained_linear()
    try:
        yield len(linears)
    finally:
        from torch import nn

        for linear in linears:
            linear.__class__ = nn.Linear


@cache
def _trained_linear() -> type[nn.Linear]:
    """A linear layer whose three products (output, gradients of input and weight) are oneDNN's."""
    import torch

    def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """``a bᵀ + bias``."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return result

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            ctx.save_for_backward(x, weight)
            return product(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            x, weight = ctx.saved_tensors
            rows = gradient.reshape(-1, gradient.shape[-1])
            of_x, of_weight, of_bias = ctx.needs_input_grad
            return (
                product(rows, weight.t()).view(x.shape) if of_x else None,
                product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if of_weight else None,
                rows.sum(dim=0) if of_bias else None,
            )

    class TrainedLinear(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if input.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not input.numel():
                return super().forward(input)
            result: Tensor = Product.apply(input, self.weight, self.bias)
            return result

    return TrainedLinear


def _usable() -> bool:
    import torch

    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _replaceable(module: nn.Module) -> bool:
    """Whether it is a plain linear layer in float32 on a CPU."""
    from torch import float32, nn

    return type(module) is nn.Linear and module.weight.dtype == float32 and module.weight.device.type == "cpu"
