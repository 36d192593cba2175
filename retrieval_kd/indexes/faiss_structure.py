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
            f"factory '{factory}' makes no index of {dimension}-dimensional vectors: "
            f"{faiss_words(error)}{_nearest_divisors(factory, dimension) if 'subquantizers' in str(error) else ''}"
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise RecipeError(f"factory '{factory}' has no inner product in FAISS, only L2; choose another")
    if any(isinstance(part, faiss.IndexIDMap | faiss.IndexIDMap2) for part in parts(index)):
        raise RecipeError(f"factory '{factory}': leave out IDMap; ids are kept beside the index")
    for step in (step for part in parts(index) for step in _transforms(part)):
        if _keeps_principal_components(step) and step.d_out > step.d_in:
            raise RecipeError(f"factory '{factory}': {step.d_in} dimensions have no {step.d_out} principal components")
    return index


def faiss_words(error: Exception) -> str:
    """FAISS's message without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?('.*' failed: )?", "", str(error), flags=re.DOTALL).strip()


def _nearest_divisors(factory: str, dimension: int) -> str:
    """``; M = 7 does not divide 384, 6 and 8 do`` for a quantizer whose sub-vectors do not fill the dimension."""
    reduced = re.search(r"(?:PCA[WR]*|OPQ\d+_|ITQ|RR)(\d+),", factory)
    length = int(reduced[1]) if reduced else dimension
    for number in re.findall(r"(?:^|[,_(]|\bO)PQ(\d+)", factory):
        m = int(number)
        if m and length % m:
            fitting = [divisor for divisor in range(1, length + 1) if length % divisor == 0]
            near = {max(d for d in fitting if d < m), min((d for d in fitting if d > m), default=length)}
            return f"; M = {m} does not divide {length}, {' and '.join(str(d) for d in sorted(near))} do"
    return ""


def set_parameters(index: Any, factory: str, values: Mapping[str, Any]) -> None:
    """Sets search parameters by our names; `RecipeError` for one that this index does not have."""
    faiss = import_faiss()
    for name, value in values.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, PARAMETERS[name], float(value))
        except RuntimeError as error:
            fitting = ", ".join(supported_parameters(index)) or "none"
            raise RecipeError(f"factory '{factory}' has no search parameter '{name}' (it has: {fitting})") from error


def supported_parameters(index: Any) -> list[str]:
    """The search parameters that an index has, by our names."""
    faiss = import_faiss()
    inside = list(parts(index))
    lists = any(isinstance(part, faiss.IndexIVF) for part in inside)
    has = {
        "nprobe": lists,
        "ef_search": isinstance(searched_part(index), faiss.IndexHNSW),
        "quantizer_ef_search": lists and any(isinstance(part, faiss.IndexHNSW) for part in inside),
        "k_factor": isinstance(faiss.downcast_index(index), faiss.IndexRefine),
    }
    return [name for name, there in has.items() if there]


def searched_part(index: Any) -> Any:
    """The part that finds rows: without the transforms before it and the refinement after it."""
    faiss = import_faiss()
    part = faiss.downcast_index(index)
    if isinstance(part, faiss.IndexPreTransform):
        return searched_part(part.index)
    return searched_part(part.base_index) if isinstance(part, faiss.IndexRefine) else part


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


def adds_at_once(index: Any) -> bool:
    """Whether all vectors must be added in one batch, because the graph cannot grow."""
    faiss = import_faiss()
    return any(isinstance(part, faiss.IndexNSG | faiss.IndexNNDescent) for part in parts(index))


def prepare_training(index: Any, seed: int) -> None:
    """Seeds the k-means of every part, and leaves out what costs minutes or repeats what is logged once."""
    _give_rotations_a_quantizer(index)
    for part in parts(index):
        for clustering in _clusterings(part):
            clustering.seed = seed
            clustering.min_points_per_centroid = 1  # FAISS's own warning, once a subspace; ours comes once
        if hasattr(part, "do_polysemous_training"):
            # It orders codes for a Hamming filter that no search parameter here uses; scores stay the same.
            part.do_polysemous_training = False


def _clusterings(part: Any) -> Iterator[Any]:
    """The parameters of every k-means that training this part runs."""
    faiss = import_faiss()
    holders = [part, getattr(part, "pq", None), getattr(part, "rq", None)]
    product = getattr(part, "prq", None)
    if product is not None:
        holders += [faiss.downcast_AdditiveQuantizer(product.subquantizer(place)) for place in range(product.nsplits)]
    holders += [rotation.pq for rotation in _rotations(part)]
    yield from (holder.cp for holder in holders if hasattr(holder, "cp"))


def _transforms(part: Any) -> Iterator[Any]:
    """The transforms before an index, each as its own class."""
    faiss = import_faiss()
    if isinstance(part, faiss.IndexPreTransform):
        yield from (faiss.downcast_VectorTransform(part.chain.at(step)) for step in range(part.chain.size()))


def _rotations(part: Any) -> Iterator[Any]:
    """The OPQ matrices before an index."""
    return (step for step in _transforms(part) if isinstance(step, import_faiss().OPQMatrix))


def _keeps_principal_components(step: Any) -> bool:
    faiss = import_faiss()
    return isinstance(step, faiss.PCAMatrix) or (isinstance(step, faiss.ITQTransform) and step.do_pca)


def _give_rotations_a_quantizer(index: Any) -> None:
    """Lets every OPQ matrix train with a quantizer that is seeded too, of the code size that follows it."""
    faiss = import_faiss()
    for part in parts(index):
        for rotation in _rotations(part):
            if rotation.pq is None:
                bits = next((inner.pq.nbits for inner in parts(part.index) if hasattr(inner, "pq")), 8)
                quantizer = faiss.ProductQuantizer(rotation.d_out, rotation.M, min(bits, 8))
                rotation.pq = quantizer
                quantizer.this.disown()  # the matrix keeps its address alone


def most_centroids(index: Any) -> int:
    """The number of centroids of its largest k-means or codebook; 1 without any."""
    faiss = import_faiss()
    found = [1]
    for part in parts(index):
        found.append(getattr(part, "nlist", 1))
        found.append(getattr(getattr(part, "pq", None), "ksub", 1))
        found += [rotation.pq.ksub for rotation in _rotations(part) if rotation.pq is not None]
        if hasattr(part, "aq"):
            found.append(1 << int(faiss.vector_to_array(part.aq.nbits).max()))
    return int(max(found))


def vectors_needed(index: Any) -> int:
    """The least number of vectors to train it: one for each centroid, and for each dimension of a PCA (RQ has one).

    An OPQ rotation needs one for each dimension too: FAISS 1.15 writes beyond its memory when it gets fewer.
    """
    needed = [most_centroids(index)]
    for part in parts(index):
        needed += [step.d_out for step in _transforms(part) if _keeps_principal_components(step)]
        needed += [rotation.d_in for rotation in _rotations(part)]
        if hasattr(part, "rq"):
            needed.append(part.rq.d)
        if hasattr(part, "prq"):
            needed.append(part.prq.d // part.prq.nsplits)
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
    """The bytes that do not grow with the vectors: centroids, codebooks and transforms, as float32."""
    faiss = import_faiss()
    total = 0
    for part in parts(index):
        if isinstance(part, faiss.IndexIVF):
            total += 4 * part.nlist * part.d
        pq = getattr(part, "pq", None)
        if pq is not None:
            total += 4 * pq.ksub * part.d
        if hasattr(part, "aq"):
            total += 4 * part.aq.total_codebook_size * part.aq.d
        for step in _transforms(part):
            if isinstance(step, faiss.LinearTransform | faiss.ITQTransform):
                total += 4 * step.d_in * step.d_out
            if isinstance(step, faiss.PCAMatrix):
                total += 4 * step.d_in**2  # all components are kept beside those that are used
            if isinstance(step, faiss.ITQTransform):
                total += 4 * step.d_out**2
    return total


def prepare_decoding(index: Any) -> None:
    """Lets ``index`` reconstruct documents: in lists, by a table of 8 bytes a document, in memory."""
    faiss = import_faiss()
    for part in parts(index):
        if isinstance(part, faiss.IndexIVFFastScan) and part.fine_quantizer is None:
            # FAISS 1.15 does not set it when it reads a file, and crashes without it.
            part.fine_quantizer = getattr(part, "pq", None) or getattr(part, "aq", None)
        if isinstance(part, faiss.IndexIVF):
            part.make_direct_map()
