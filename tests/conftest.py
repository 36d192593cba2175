"""Everything runs offline: no model hub, no dataset hub, no telemetry; the user's cache is a folder of the test run.

The tiny collection and models are made once for all tests.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
