"""A small BEIR folder that every test of this directory may change."""

from __future__ import annotations

from pathlib import Path

import pytest
from pets import CORPUS, QUERIES, TEST_QRELS, TRAIN_QRELS, write_jsonl


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "queries.jsonl", QUERIES)
    (folder / "qrels" / "test.tsv").write_text(TEST_QRELS)
    (folder / "qrels" / "train.tsv").write_text(TRAIN_QRELS)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "irds"))
    return tmp_path / "cache"
