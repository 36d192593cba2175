"""The tiny collection and models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from retrieval_kd.data.collection import Collection


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)  # more would wait for one another where other work has the cores
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def collection(shared: Path) -> Collection:
    return tiny.make_tiny_collection(shared)


@pytest.fixture(scope="session")
def candidates(shared: Path, collection: Collection) -> Path:
    return tiny.make_candidates(shared, collection)


@pytest.fixture(scope="session")
def dense(shared: Path) -> Path:
    return tiny.make_dense(shared / "dense")


@pytest.fixture(scope="session")
def cross_encoder(shared: Path) -> Path:
    return tiny.make_cross_encoder(shared / "cross-encoder")
