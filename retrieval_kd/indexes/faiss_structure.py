"""What a FAISS factory string means: its parts, the vectors it must be trained on, the bytes it stores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from retrieval_kd.errors import RecipeError
from retrieval_kd.indexes.faiss_package import import_faiss

PARAMETERS = {
    "nprobe": "nprobe",
    "ef_search": "efSearch",
    "quantizer_ef_search": "quantizer_efSearch",
    "k_factor": "k_factor_rf",
}
"""Our name of a search parameter → FAISS's."""


def new_index(factory: str, dimension: int) -> Any:
    """An empty inner-product FAISS index; `RecipeError` quotes the factory string and FAISS's own words."""
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RecipeError(
            f"factory '{factory}' makes no index of {dimension}-dimensional vectors: {faiss_words(error)}"
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RecipeError(f"factory '{factory}' has no inner product in FAISS, only L2; choose another")
    if any(isinstance(part, faiss.IndexIDMap | faiss.IndexIDMap2) for part in parts(index)):
        raise RecipeError(f"factory '{factory}': leave out IDMap; ids are kept beside the index")
    return index


def faiss_words(error: Exception) -> str:
    """FAISS's message without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL).strip()


def set_parameters(index: Any, factory: str, values: Mapping[str, Any]) -> None:
    """Sets search parameters by our names; `RecipeError` for one that this index does not have."""
    faiss = import_faiss()
    for name, value in values.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, PARAMETERS[name], float(value))
        except RuntimeError as error:
            fitting = ", ".join(supported_parameters(factory, index.d)) or "none"
            raise RecipeError(f"factory '{factory}' has no search parameter '{name}' (it has: {fitting})") from error


def supported_parameters(factory: str, dimension: int) -> list[str]:
    """The search parameters that an index of this factory string has, by our names."""
    faiss = import_faiss()
    found = []
    for name, native in PARAMETERS.items():
        try:
            faiss.ParameterSpace().set_index_parameter(new_index(factory, dimension), native, 1.0)
        except RuntimeError:
            continue
        found.append(name)
    return found


def parts(index: Any) -> Iterator[Any]:
    """``index`` and every index inside it, each as its own class; they live as long as ``index``."""
    faiss = import_faiss()
    # Not assigned to ``index``: a downcast does not own what it points to.
    part = faiss.downcast_index(index)
    yield part
    for name in ("index", "base_index", "refine_index", "storage", "quantizer"):
        inner = getattr(part, name, None)
        if isinstance(inner, faiss.Index):
            yield from parts(inner)


def is_graph(index: Any) -> bool:
    """Whether a graph is built, whose links depend on the order in which threads add vectors."""
    faiss = import_faiss()
    return any(isinstance(part, faiss.IndexHNSW | faiss.IndexNSG | faiss.IndexNNDescent) for part in parts(index))


def prepare_training(index: Any, seed: int) -> None:
    """Seeds the k-means of every part, and leaves out what costs minutes or repeats what is logged once."""
    for part in parts(index):
        for clustering in (getattr(part, "cp", None), getattr(getattr(part, "pq", None), "cp", None)):
            if clustering is not None:
                clustering.seed = seed
                clustering.min_points_per_centroid = 1  # FAISS's own warning, once a subspace; ours comes once
        if hasattr(part, "do_polysemous_training"):
            # It orders codes for a Hamming filter that no search parameter here uses; scores stay the same.
            part.do_polysemous_training = False


def vectors_needed(index: Any) -> int:
    """The least number of vectors that its training accepts: one for each centroid of its largest k-means."""
    needed = [1]
    for part in parts(index):
        needed.append(getattr(part, "nlist", 1))
        needed.append(getattr(getattr(part, "pq", None), "ksub", 1))
    return int(max(needed))


def bytes_per_vector(index: Any) -> float:
    """The bytes that each added vector takes: its code, its graph links, its number in an inverted list."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    if isinstance(part, faiss.IndexPreTransform):
        return bytes_per_vector(part.index)
    if isinstance(part, faiss.IndexRefine):
        return bytes_per_vector(part.base_index) + bytes_per_vector(part.refine_index)
    if isinstance(part, faiss.IndexHNSW):
        links = part.hnsw.nb_neighbors(0)
        above = part.hnsw.nb_neighbors(1)
        # Level l > 0 holds a vector with probability M^-l; an offset (8 bytes) and a level (4) go with each vector.
        return bytes_per_vector(part.storage) + 4 * float(links + above / max(above - 1, 1)) + 12
    if isinstance(part, faiss.IndexNSG):
        return bytes_per_vector(part.storage) + 4 * float(part.nsg.R)
    if isinstance(part, faiss.IndexIVF):
        return float(part.code_size + 8)
    return float(part.sa_code_size())


def fixed_bytes(index: Any) -> int:
    """The bytes that do not grow with the vectors: centroids, codebooks and rotations, as float32."""
    faiss = import_faiss()
    total = 0
    for part in parts(index):
        if isinstance(part, faiss.IndexIVF):
            total += 4 * part.nlist * part.d
        pq = getattr(part, "pq", None)
        if pq is not None:
            total += 4 * pq.ksub * part.d
        if isinstance(part, faiss.IndexPreTransform):
            steps = [part.chain.at(step) for step in range(part.chain.size())]
            total += sum(4 * step.d_in * step.d_out for step in steps)
    return total
