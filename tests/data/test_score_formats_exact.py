"""Decimals and float32: what is written reads back to the last bit, what is read is rounded once."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pets import write_jsonl
from tiny_score_files import MAXIMUM, SUBNORMAL, bits, make_scores

from retrieval_kd.data.score_formats.convert import FORMATS, convert_scores
from retrieval_kd.data.score_formats.lines import json_line, parsed
from retrieval_kd.data.score_formats.pairs import float32_of
from retrieval_kd.data.scores import Scores
from retrieval_kd.data.sources import make_collection

FINITE = st.integers(0, 2**32 - 1).map(lambda n: np.uint32(n).view(np.float32)).filter(np.isfinite)


def read(texts: list[str]) -> np.ndarray:
    return float32_of(pa.array(texts, pa.string()), str)


def nearest(text: str) -> np.float32:
    """The float32 nearest to a decimal by exact arithmetic, ties to the even last bit."""
    start = np.float32(float(text))
    candidates = [start, np.nextafter(start, np.float32(np.inf)), np.nextafter(start, np.float32(-np.inf))]
    exact = Fraction(text)
    return min(candidates, key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(np.uint32)) & 1))


@given(FINITE)
@example(np.float32(MAXIMUM))
@example(np.float32(SUBNORMAL))
@example(np.float32(-0.0))
@settings(max_examples=400, deadline=None)
def test_every_float32_reads_back_from_its_text(value: np.float32) -> None:
    values = np.array([value])
    (text,) = values.astype(str).tolist()
    assert read([text]).tobytes() == values.tobytes()
    assert np.float32(float(text)).tobytes() == value.tobytes()
    line = json_line({"scores": values, "score": value}).decode()
    assert line == f'{{"scores": [{text}], "score": {text}}}\n'
    found = parsed(line)
    assert read([*found["scores"], found["score"]]).tobytes() == values.tobytes() * 2
    assert np.float32(json.loads(line)["score"]).tobytes() == value.tobytes()


def test_many_float32() -> None:
    """All 65,536 upper halves of the bit pattern, each with four lower halves."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    values = np.concatenate([(upper | low).view(np.float32) for low in (0, 1, 0x8000, 0xFFFF)])
    values = values[np.isfinite(values)]
    assert len(values) > 260_000
    assert read(values.astype(str).tolist()).tobytes() == values.tobytes()


@given(FINITE, st.integers(0, 10**25), st.sampled_from([-1, 0, 1]))
@settings(max_examples=300, deadline=None)
def test_decimals_near_a_midpoint_are_rounded_once(value: np.float32, step: int, side: int) -> None:
    """Exactly between two float32, or off by less than float64 can see."""
    above = np.nextafter(value, np.float32(np.inf))
    if not 1e-30 < abs(value) < 1e30 or not np.isfinite(above):
        return
    middle = (Fraction(float(value)) + Fraction(float(above))) / 2
    exact = middle + side * abs(middle) * step / 10**45
    scale = 10**90
    text = f"{round(exact * scale)}e-90"
    assert read([text])[0].tobytes() == nearest(text).tobytes()


def test_double_rounding_by_hand() -> None:
    """1 + 2**-24 lies between 1 and the next float32; a little more must go up, though float64 cannot hold it."""
    assert read(["1.000000059604644775390625", "1.00000005960464477539062500000001"]).tolist() == [1.0, 1 + 2.0**-23]
    assert np.float32(float("1.00000005960464477539062500000001")) == 1.0


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r\x0b\x0c "), min_size=1, max_size=4)


@pytest.mark.parametrize("name", [name for name, layout in FORMATS.items() if layout.write and not layout.texts])
@given(st.dictionaries(WORDS, st.dictionaries(WORDS, FINITE, min_size=2, max_size=5), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_there_and_back(
    name: str, tmp_path_factory: pytest.TempPathFactory, rows: dict[str, dict[str, np.float32]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    scores = make_scores(folder / "own", [(query, list(docs), list(docs.values())) for query, docs in rows.items()])
    there = folder / ("x.jsonl" if FORMATS[name].suffixes else "x.txt")
    convert_scores(scores.path, from_format="retrieval-kd", to_format=name, out=there)
    back = convert_scores(there, from_format=name, to_format="retrieval-kd", out=folder / "back")
    assert isinstance(back, Scores)
    assert bits(back) == bits(scores)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("flagembedding", ".jsonl"),
        ("sentence-transformers", ".jsonl"),
        ("sentence-transformers", ".parquet"),
        ("tevatron", ".jsonl"),
    ],
)
def test_there_and_back_with_texts(name: str, suffix: str, tmp_path: Path) -> None:
    """200 queries with 2 to 9 of 40 documents; texts with quotes, tabs and line separators."""
    folder = tmp_path / "beir"
    folder.mkdir()
    odd = ['"', "\t", "\\", "\u2028", "é"]
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": f"d{i}", "title": f"t{i % 3}", "text": f"x{odd[i % 5]}{i}"} for i in range(40)],
    )
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"{odd[i % 5]} {i}"} for i in range(200)])
    collection = make_collection(str(folder), tmp_path / "collection")
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    values = iter(patterns[np.isfinite(patterns)].tolist())
    rows = []
    for i in range(200):
        documents = generator.choice(40, int(generator.integers(2, 10)), replace=False).tolist()
        rows.append((f"q{i}", [f"d{j}" for j in documents], [next(values) for _ in documents]))
    scores = make_scores(tmp_path / "own", rows, collection, per_shard=64)
    there = tmp_path / f"x{suffix}"
    convert_scores(scores.path, from_format="retrieval-kd", to_format=name, out=there)
    back = convert_scores(
        there, from_format=name, to_format="retrieval-kd", out=tmp_path / "back", collection=collection
    )
    assert isinstance(back, Scores)
    assert bits(back) == bits(scores)
