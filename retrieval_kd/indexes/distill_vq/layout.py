"""What a factory string of Distill-VQ says: lists, sub-vectors, bits, and how codewords make a vector."""

from __future__ import annotations

import re
from dataclasses import dataclass

from retrieval_kd.errors import RecipeError

_PATTERN = re.compile(
    r"(?P<opq>OPQ\d+(_\d+)?,)?"
    r"((?P<lists>IVF\d+)(,|$))?"
    r"((?P<kind>PQ|RQ)(?P<parts>\d+)(x(?P<bits>\d+))?(?P<fast>fs)?|(?<=,)Flat)?"
)


@dataclass(frozen=True)
class Layout:
    """The parts of an index: ``parts`` codebooks of ``2**bits`` codewords, behind lists and a rotation or not.

    ``product``: codebook m is of sub-vector m (PQ), and codewords are concatenated; else (RQ) each is of whole vectors,
    and they are added. ``parts`` is 0 for lists of whole vectors (``IVF64,Flat``).
    """

    factory: str
    """Without FastScan, whose codes are packed at the end."""
    rotated: bool
    lists: int
    parts: int
    bits: int
    product: bool
    fast: bool


def layout_of(factory: str) -> Layout:
    """The parts of ``factory``; `RecipeError` for another than ``[OPQm,][IVFn,](PQm[x4|x8|x4fs]|RQm[x4|x8]|Flat)``."""
    found = _PATTERN.fullmatch(factory)
    if found is None or not (found["lists"] or found["parts"]) or factory.endswith(","):
        raise RecipeError(
            f"factory '{factory}' has nothing that Distill-VQ trains; it takes [OPQm,][IVFn,] and one of PQmx8, "
            "PQmx4, PQmx4fs, RQmx8, RQmx4 or (with IVF) Flat"
        )
    bits, parts = int(found["bits"] or 8), int(found["parts"] or 0)
    if bits not in (4, 8) or (found["fast"] and (bits != 4 or found["kind"] == "RQ")):
        raise RecipeError(f"factory '{factory}': codes have 8 or 4 bits, and FastScan those of PQ with 4")
    if bits == 4 and parts % 2:
        raise RecipeError(f"factory '{factory}': 4-bit codes come in pairs, and {parts} is odd")
    return Layout(
        factory=factory.removesuffix("fs") if found["fast"] else factory,
        rotated=found["opq"] is not None,
        lists=int(found["lists"].removeprefix("IVF")) if found["lists"] else 0,
        parts=parts,
        bits=bits,
        product=found["kind"] != "RQ",
        fast=found["fast"] is not None,
    )
