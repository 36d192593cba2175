"""IDF tables against the formula, and tables of other vocabularies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_sparse

from retrieval_kd.errors import DataError, InputError
from retrieval_kd.models import idf
from retrieval_kd.models.idf import idf_of_texts, read_idf, write_idf

W = 5
"""The id of ``w0``."""


def test_table_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """D = 4; w1 in all, w2 in two (twice in one of them), w3 in one; ``nowhere`` is an unknown word."""
    monkeypatch.setattr(idf, "_TEXTS_AT_ONCE", 3)
    table = idf_of_texts(["w1 w2 w2", "w1 w2", "w1 w3 nowhere", " ".join(["w1"] * 50)], tiny.tokenizer())
    weights = table.weights
    assert weights.dtype == np.float32 and len(weights) == 68
    assert weights[W + 1] == pytest.approx(math.log(1 + 0.5 / 4.5))
    assert weights[W + 2] == pytest.approx(math.log(1 + 2.5 / 2.5))
    assert weights[W + 3] == pytest.approx(math.log(1 + 3.5 / 1.5))
    assert weights[:W].tolist() == [0, 0, 0, 0, 0]
    assert weights[W + 4 :].tolist() == [1] * 59 and weights[W] == 1
    assert (table.known, table.unseen) == (3, 60)


def test_largest_value_of_ms_marco() -> None:
    """df 1 of 8,841,823 passages is 15.58954, the largest value in the table that OpenSearch publishes."""
    assert math.log(1 + (8841823 - 1 + 0.5) / 1.5) == pytest.approx(15.58954, abs=1e-5)


def test_written_and_read_again(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    table = idf_of_texts(["w1 w2", "w1"], tokenizer)
    write_idf(tmp_path / "idf.json", table.weights, tokenizer)
    written = json.loads((tmp_path / "idf.json").read_text())
    assert len(written) == 68 and list(written)[W] == "w0" and written["[UNK]"] == 0
    again = read_idf(tmp_path / "idf.json", tokenizer)
    np.testing.assert_allclose(again.weights, table.weights, atol=1e-6)
    assert (again.known, again.unseen) == (63, 0)


def test_tokens_that_a_table_lacks_weigh_one(tmp_path: Path) -> None:
    """[UNK] weighs 0 whatever the table says; 68 tokens less 5 special ones and w1, w2 have no weight."""
    path = tiny_sparse.write_table(tmp_path / "idf.json", {"w1": 2.5, "w2": 0, "[UNK]": 9})
    table = read_idf(path, tiny.tokenizer())
    assert table.weights[W + 1] == 2.5 and table.weights[W + 2] == 0 and table.weights[1] == 0
    assert table.weights[W + 3] == 1 and (table.known, table.unseen) == (2, 61)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (
            {"w1": 1, "x7": 1, "x8": 2},
            InputError,
            r"2 of its 3 tokens are not among the 68 of the base's tokenizer \('x7', 'x8'\)",
        ),
        ({"w1": -1}, DataError, r"1 weights are no numbers of at least 0, of the tokens 'w1'"),
        ({"w1": "2"}, DataError, "no numbers"),
        ({"w1": math.nan}, DataError, "no numbers"),
        ({}, DataError, "not an object"),
    ],
)
def test_tables_that_cannot_be(table: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        read_idf(tiny_sparse.write_table(tmp_path / "idf.json", table), tiny.tokenizer())


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "idf.json").write_text("w1\t2\n")
    with pytest.raises(DataError, match=r"idf\.json: not JSON"):
        read_idf(tmp_path / "idf.json", tiny.tokenizer())
