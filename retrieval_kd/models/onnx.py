"""ONNX files: exporting a torch model, making it int8, running it with onnxruntime on the CPU (without torch)."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retrieval_kd.errors import MissingExtraError, RetrievalKDError

if TYPE_CHECKING:
    from torch import Tensor, nn

ONE_FILE_LIMIT = 1_500_000_000
"""Bytes of weights above which they lie beside the ``.onnx`` file: a protobuf file ends at 2 GiB."""


def require_onnx(*packages: str) -> None:
    """Nothing, or `MissingExtraError` naming the pip line when one of ``packages`` (all of them) is not installed."""
    for package in packages or ("onnx", "onnxruntime", "onnxscript"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"ONNX needs the package '{error.name}'", "onnx") from error


def export_onnx(model: nn.Module, example: Mapping[str, Tensor], path: Path, *, output: str) -> None:
    """Writes ``model`` as an ONNX file with the inputs of ``example`` ([B, S] each; any B and S later) and one output.

    ``model`` takes one dictionary of tensors, ``features``, as modules of sentence-transformers do, and returns a
    tensor. It is exported as it computes in evaluation mode. Raises `RetrievalKDError` when torch cannot export it.
    """
    require_onnx()
    import torch

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with _quiet_exporter(), torch.inference_mode():
            torch.onnx.export(
                model.eval(),
                (),
                path,
                kwargs={"features": dict(example)},
                input_names=list(example),
                output_names=[output],
                dynamic_shapes={"features": dict.fromkeys(example, axes)},
                dynamo=True,
                external_data=weights > ONE_FILE_LIMIT,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise RetrievalKDError(f"torch cannot export this model to ONNX: {error.__cause__ or error}") from error
    if fixed := _fixed_inputs(path):
        raise RetrievalKDError(
            f"torch exported this model for one length or batch only (input {fixed[0]}): a part of it loops over tokens"
        )


def _fixed_inputs(path: Path) -> list[str]:
    """Inputs of a graph that do not take any batch and length."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    return [node.name for node in inputs if any(not dim.dim_param for dim in node.type.tensor_type.shape.dim)]


def quantize_int8(source: Path, target: Path) -> None:
    """Writes ``target``: the model of ``source`` with int8 weights, a scale a column; activations are quantized in use.

    The scale of activations is that of their batch, so that a result depends slightly on what shares a batch with it.
    Embeddings and the layers of the head stay float32: they are read once a text, and every rounding of theirs counts.
    """
    require_onnx()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(source)
    # onnxruntime turns each Gemm into a MatMul with a transposed weight; the recorded shapes would then be wrong.
    heads = [f"{node.name}_MatMul" for node in model.graph.node if node.op_type == "Gemm"]
    del model.graph.value_info[:]
    add_pre_process_metadata(model)  # the exporter has simplified the graph; else onnxruntime asks for it in the log
    with _quiet_quantizer():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=heads,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(source.name + ".data").is_file(),
        )


class OnnxSession:
    """An ONNX model with one output on the CPU, with ``threads`` threads (see `default_threads`)."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        require_onnx("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or default_threads()
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [node.name for node in self._session.get_inputs()]

    def __call__(self, features: Mapping[str, Tensor | np.ndarray]) -> np.ndarray:
        """The model's output for ``features`` (tensors or arrays); those that are no input of it are left out."""
        (result,) = self._session.run(None, {name: np.asarray(features[name]) for name in self._inputs})
        return np.asarray(result)


def default_threads() -> int:
    """What ``OMP_NUM_THREADS`` says (its first number), as torch reads it; else the cores this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Deviation(NamedTuple):
    """How far values are from those expected: the absolute differences, and Kendall's tau of the two orders."""

    pairs: int
    max: float
    mean: float
    kendall_tau: float | None
    """None where there is no order to compare: a single value, or only equal ones."""


def deviation(values: np.ndarray, expected: np.ndarray) -> Deviation:
    """How far an exported model's scores [n] are from those of the model it was made from."""
    from scipy.stats import kendalltau

    difference = np.abs(values.astype(np.float64) - expected)
    ordered = len(values) > 1 and np.ptp(values) > 0 and np.ptp(expected) > 0
    tau = float(kendalltau(values, expected).statistic) if ordered else None
    return Deviation(len(values), float(difference.max()), float(difference.mean()), tau)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hides what torch's exporter says about its own internals."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # one line for each torchvision operator when torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: .* will not be used", UserWarning)
            yield
    finally:
        registration.setLevel(level)


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Keeps onnxruntime, which logs to the root logger, from setting up logging there."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
