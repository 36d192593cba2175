"""Linear layers by oneDNN instead of MKL, for inference in float32 on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def use_onednn(model: nn.Module) -> int:
    """The number of linear layers of ``model`` that oneDNN computes from now on; 0 where torch cannot.

    On x86 torch multiplies float32 matrices with MKL, which leaves an AMD processor's AVX-512 unused. oneDNN gives the
    same numbers up to rounding, about twice as fast there. The weights are repacked in place: the model cannot be
    trained, saved or exported afterwards.
    """
    import torch

    operators = torch.ops.mkldnn
    usable = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not usable or not hasattr(operators, "_linear_pointwise") or not hasattr(operators, "_reorder_linear_weight"):
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
        if type(child) is torch.nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"
    ]
    for parent, name, child in linears:
        setattr(parent, name, OneDNNLinear(child))
    return len(linears)
