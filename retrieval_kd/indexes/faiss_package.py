"""The one import of FAISS, which comes in three packages that overwrite one another."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import metadata
from types import ModuleType

from retrieval_kd.errors import MissingExtraError, RetrievalKDError

PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")
"""Distributions that all install the module ``faiss``."""


def installed_packages() -> dict[str, str]:
    """The installed FAISS distributions and their versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_packages() -> None:
    """Raises `RetrievalKDError` when more than one FAISS package is installed: their files overwrite one another."""
    found = installed_packages()
    if len(found) > 1:
        names = " and ".join(f"{name} {version}" for name, version in found.items())
        raise RetrievalKDError(
            f"{names} are both installed and overwrite each other's files; "
            f"uninstall all of them (pip uninstall {' '.join(found)}) and install the one you need again"
        )


@cache
def import_faiss() -> ModuleType:
    """The module ``faiss``.

    Raises `MissingExtraError` when no FAISS is installed, `RetrievalKDError` when two packages are at once.
    """
    check_packages()
    try:
        with warnings.catch_warnings():
            # SWIG's types warn about their missing __module__ on newer Pythons; nobody can act on it.
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ModuleNotFoundError as error:
        raise MissingExtraError("a dense index needs FAISS, which is not installed", "cpu") from error
    module: ModuleType = faiss
    return module
