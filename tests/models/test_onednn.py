from __future__ import annotations

from pathlib import Path

import pytest

from retrieval_kd.models.onednn import use_onednn


def test_linear_layers_give_the_same_numbers(shared: Path) -> None:
    """With and without bias, on matrices, on sequences and on a slice that is not contiguous."""
    import torch

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8, bias=False))
    inputs = [torch.randn(5, 16), torch.randn(3, 7, 16), torch.randn(3, 7, 16)[:, 0], torch.randn(1, 1, 16)]
    with torch.inference_mode():
        expected = [plain(x) for x in inputs]
        assert use_onednn(plain) in (0, 2)
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(plain(x), y, atol=1e-6, rtol=1e-5)


def test_only_plain_float32_layers_are_replaced() -> None:
    import torch

    class OfItsOwn(torch.nn.Linear):
        pass

    half = torch.nn.Linear(4, 4).to(torch.bfloat16)
    model = torch.nn.ModuleDict({"low": half, "own": OfItsOwn(4, 4)})
    assert use_onednn(model) == 0
    assert model["low"] is half


def test_a_torch_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert use_onednn(model) == 0
    assert type(model[0]) is torch.nn.Linear
