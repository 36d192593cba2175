"""Which FAISS packages are installed, and what is said when none or two are."""

from __future__ import annotations

import builtins
from importlib import metadata
from typing import Any

import pytest

from retrieval_kd.errors import MissingExtraError, RetrievalKDError
from retrieval_kd.indexes import faiss_package


def test_two_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.2")
    assert faiss_package.installed_packages() == {"faiss-cpu": "1.2", "faiss-gpu": "1.2", "faiss-gpu-cuvs": "1.2"}
    with pytest.raises(RetrievalKDError, match="pip uninstall faiss-cpu faiss-gpu faiss-gpu-cuvs"):
        faiss_package.check_packages()


def test_no_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_faiss(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'", name="faiss")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(MissingExtraError, match=r"pip install 'retrieval-kd\[cpu\]'"):
        faiss_package.import_faiss.__wrapped__()


def test_importing_the_recipes_needs_no_faiss() -> None:
    import subprocess
    import sys

    code = (
        "import sys, retrieval_kd.indexes.faiss_index, retrieval_kd.indexes.bm25; "
        "print({'faiss', 'torch', 'bm25s'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
