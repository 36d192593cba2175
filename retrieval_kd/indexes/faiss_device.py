"""On which devices FAISS works: the one place that knows of GPUs. Files always hold CPU indexes."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from retrieval_kd.errors import UsageError
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.indexes.faiss_structure import faiss_words

log = logging.getLogger("retrieval_kd")

MOST_GPU_HITS = 2048
"""The most hits a query that FAISS's GPU code gives."""
DEVICE = r"^(auto|cpu|all|cuda:\d+)$"
"""``auto``: the first GPU, or the CPU where there is none; ``all``: every GPU."""

Sharing = Literal["replicated", "sharded"]
"""Several GPUs each hold the whole index and answer a part of the queries, or hold a part of it and answer all."""


@dataclass(frozen=True)
class Placement:
    """The GPUs that FAISS uses, none of them for the CPU."""

    gpus: tuple[int, ...] = ()
    sharing: Sharing = "replicated"


def placement(device: str, sharing: Sharing = "replicated") -> Placement:
    """Where FAISS works for ``device``. Without any GPU that is the CPU, which is said once where a GPU was asked for.

    Raises `UsageError` for a GPU that is not among those there are.
    """
    if device == "cpu":
        return Placement()
    number = int(import_faiss().get_num_gpus())
    if number == 0:
        if device != "auto":
            _say_that_there_is_no_gpu(device)
        return Placement()
    if device == "all":
        return Placement(tuple(range(number)), sharing)
    gpu = 0 if device == "auto" else int(device.removeprefix("cuda:"))
    if gpu >= number:
        raise UsageError(f"device {device}: FAISS sees {number} GPUs, cuda:0 to cuda:{number - 1}")
    return Placement((gpu,), sharing)


@cache
def _say_that_there_is_no_gpu(device: str) -> None:
    log.warning(
        "device %s: FAISS sees no GPU and works on the CPU (GPUs need the package faiss-gpu or faiss-gpu-cuvs)", device
    )


def to_gpus(index: Any, where: Placement, *, float16: bool = False) -> Any | None:
    """A copy of a CPU index on the GPUs; None (and a warning) for one that FAISS cannot put there.

    ``float16`` halves what a flat part stores and looks up, at scores rounded to 11 bits: it is safe where the hits
    are scored again afterwards.
    """
    faiss = import_faiss()
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = float16
    options.shard = where.sharing == "sharded"
    try:
        resources = [faiss.StandardGpuResources() for _ in where.gpus]
        if len(where.gpus) == 1:
            return faiss.index_cpu_to_gpu(resources[0], where.gpus[0], index, options)
        return faiss.index_cpu_to_gpu_multiple_py(resources, index, options, list(where.gpus))
    except RuntimeError as error:
        log.warning("FAISS keeps this index on the CPU: %s", faiss_words(error))
        return None


class CagraGraph:
    """A graph over whole vectors that cuVS's CAGRA builds on one GPU (Ootomo et al., 2024), all of it at once.

    It has 2 ``links`` a vector, as the base of HNSW, and is searched on the CPU as HNSW is.
    """

    is_trained = True

    def __init__(self, dimension: int, links: int, gpu: int) -> None:
        faiss = import_faiss()
        settings = faiss.GpuIndexCagraConfig()
        settings.device = gpu
        settings.graph_degree = 2 * links
        settings.intermediate_graph_degree = 4 * links
        self._resources = faiss.StandardGpuResources()
        self.graph = faiss.GpuIndexCagra(self._resources, dimension, faiss.METRIC_INNER_PRODUCT, settings)

    def add(self, matrix: np.ndarray) -> None:
        """Builds the graph of ``matrix`` [n, d] float32."""
        self.graph.train(matrix)


def builder(index: Any, factory: str, where: Placement) -> Any | None:
    """What trains and fills an empty CPU index in its place, on the first of the GPUs; None: do it on the CPU."""
    if not where.gpus:
        return None
    graph = re.fullmatch(r"HNSW(\d*)(?:,Flat)?", factory)
    if graph is not None and "CUVS" in import_faiss().get_compile_options():
        return CagraGraph(index.d, int(graph[1] or 32), where.gpus[0])
    return to_gpus(index, Placement(where.gpus[:1]))


def to_cpu(built: Any) -> Any:
    """The CPU index of what `builder` made and filled: what is written to a file."""
    return import_faiss().index_gpu_to_cpu(built.graph if isinstance(built, CagraGraph) else built)
