from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from retrieval_kd.models.onednn import onednn_training, use_onednn


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


def test_training_has_the_same_gradients_and_gives_the_layers_back() -> None:
    """Outputs and the gradients of input, weights and biases, on sequences and on a slice that is not contiguous."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8, bias=False))
    for x in (torch.randn(5, 16), torch.randn(3, 7, 16), torch.randn(3, 7, 16)[:, ::2], torch.randn(0, 16)):
        found = []
        for inside in (False, True):
            given = x.clone().requires_grad_()
            with onednn_training(model) if inside else nullcontext(0) as layers:
                assert layers in ((0, 2) if inside else (0,))
                y = model(given)
                y.square().sum().backward()
            found.append([y, given.grad, *(p.grad for p in model.parameters())])
            model.zero_grad()
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert [type(layer) for layer in model[::2]] == [torch.nn.Linear] * 2


def test_a_frozen_weight_gets_no_gradient_and_bfloat16_stays_torch_s() -> None:
    import torch

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 4)
    with onednn_training(layer):
        layer(x).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 2.0))
