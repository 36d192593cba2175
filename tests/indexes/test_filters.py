"""Filters over attributes: what they match, told apart from mistakes, in an index, a searcher, a run and an update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import DOCUMENTS, document_text, make_tiny_collection
from tiny_indexes import hits, sparse_documents, write_documents

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import DataError, UsageError
from retrieval_kd.indexes.attributes import Filter, joined, matching
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.update import update_index
from retrieval_kd.search.run import search_run
from retrieval_kd.search.searcher import Searcher

TABLE = pa.table(
    {
        "year": pa.array([2019, 2020, None, 2021], pa.int64()),
        "lang": ["en", "de", "en", None],
        "score": [0.5, None, 2.0, float("nan")],
        "open": [True, False, None, True],
        "source name": ["a, b", "a", "x = y", "ß"],
    }
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("year = 2020", [1]),
        ("year=2020", [1]),
        ("year != 2020", [0, 3]),
        ("year >= 2020", [1, 3]),
        (" year<2021 ", [0, 1]),
        ("year > 2020", [3]),
        ("year <= 2019", [0]),
        ("year in 2019,2021, 7", [0, 3]),
        ("year in 1", []),
        ("lang = en", [0, 2]),
        ("lang != en", [1]),
        ("lang in de,en", [0, 1, 2]),
        ("lang > de", [0, 2]),
        ("score >= 0.5", [0, 2]),
        ("open = true", [0, 3]),
        ("open != true", [1]),
        ("source name = a, b", [0]),
        ('source name in "a, b",ß', [0, 3]),
        ('source name = "a, b"', [0]),
        ('lang != "en"', [1]),
        ("source name = x = y", [2]),
        ("lang = ", []),
    ],
)
def test_what_matches(text: str, expected: list[int]) -> None:
    """A document without the attribute never matches, whatever the operator."""
    assert np.flatnonzero(matching(TABLE, [text], "index")).tolist() == expected


def test_all_filters_must_hold() -> None:
    assert np.flatnonzero(matching(TABLE, ["year >= 2019", "lang in en,de", "open = true"], "index")).tolist() == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yaer = 2020", r"no attribute 'yaer' \(did you mean 'year'\?\); there are: year, lang, score, open, source"),
        ("year = old", r"'year' is a column of int64; 'old' cannot be compared with it by ="),
        ("year in 2020,2.5", r"'year' is a column of int64; '2020,2.5' cannot"),
        ("open = maybe", r"'open' is a column of bool"),
        ("year", r"filter 'year': write it as 'field = value'"),
        ("= 3", r"write it as 'field = value'"),
        ("lang == en", r"no attribute 'lang =' \(did you mean 'lang'"),
        ("year => 3", r"no attribute 'year ='"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        matching(TABLE, [text], "index")


def test_operators_of_two_signs_are_not_read_as_one() -> None:
    assert Filter.parse("a<=3") == ("a", "<=", "3")
    assert Filter.parse("inside in x") == ("inside", "in", "x")


def test_tables_that_lack_columns_are_filled_with_null() -> None:
    first, second = pa.table({"year": [1]}), pa.table({"lang": ["en", "de"]})
    assert joined(first, 1, second, 2).to_pydict() == {"year": [1, None, None], "lang": [None, "en", "de"]}
    assert joined(first, 1, None, 2).to_pydict() == {"year": [1, None, None]}
    assert joined(None, 2, first, 1).to_pydict() == {"year": [None, None, 1]}
    assert joined(None, 2, None, 1) is None
    with pytest.raises(DataError, match="attributes of the new documents do not fit"):
        joined(first, 1, pa.table({"year": ["old"]}), 1)


def make_attributed(folder: Path, years: dict[str, int | None]) -> Collection:
    """A collection of documents with a year; d1's text is ``w1 w41 …``."""
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"_id": doc_id, "title": "", "text": document_text(int(doc_id[1:]) % DOCUMENTS), "year": year}
        for doc_id, year in years.items()
    ]
    (beir / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (beir / "queries.jsonl").write_text('{"_id": "q", "text": "w41 w50"}\n{"_id": "r", "text": "w42"}\n')
    (beir / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"{query}\t{rows[0]['_id']}\t1\n" for query in "qr")
    )
    return make_collection(str(beir), folder / "collection")


YEARS = {f"d{row}": None if row % 5 == 4 else 2000 + row for row in range(30)}


def test_a_searcher_and_a_run_keep_to_the_filters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collection = make_attributed(tmp_path, YEARS)
    build_index("bm25", collection=collection, out=tmp_path / "index")
    searcher = Searcher.load(tmp_path / "index")
    everything = searcher.search("w41 w50", 30)
    found = searcher.search("w41 w50", 3, filters=["year >= 2005", "year < 2022"])
    recent = [hit for hit in everything if 2005 <= (YEARS[hit.doc_id] or 0) < 2022]
    assert found == recent[:3] and len(found) == 3
    assert searcher.search("nothing", 3, filters=["year > 2000"]) == [] and "fulfils" not in caplog.text
    assert searcher.search("w41 w50", 3, filters=["year > 3000", "year < 4000"]) == []
    assert caplog.messages[-1] == f"{tmp_path}/index: no document fulfils year > 3000 and year < 4000"
    run = search_run(tmp_path / "index", collection, "test", tmp_path / "run", k=3, filters=["year = 2011"])
    assert isinstance(run, Run) and run.hits("q")[0] == ["d11"]
    assert run.manifest is not None and run.manifest.recipe["filters"] == ["year = 2011"]
    with pytest.raises(UsageError, match="no attribute 'lang'"):
        searcher.search("w41", filters=["lang = en"])


def test_an_index_without_attributes_says_so(tmp_path: Path) -> None:
    build_index("bm25", collection=make_tiny_collection(tmp_path), out=tmp_path / "index")
    with pytest.raises(UsageError, match="index: has no attributes to filter by"):
        Searcher.load(tmp_path / "index").search("w3", filters=["year = 3"])


def test_attributes_follow_documents_through_updates(tmp_path: Path) -> None:
    """Their rows are those of the vectors, which need not be in the collection's order."""
    first = make_attributed(tmp_path / "a", YEARS)
    second = make_attributed(tmp_path / "b", {"d40": 2040, "d41": None, "d42": 2042})
    vectors = sparse_documents(30)
    order = np.random.default_rng(0).permutation(30)
    shuffled = [f"d{row}" for row in order]
    write_documents(tmp_path / "vectors", vectors[order], shuffled, collection=first.ref())
    more = write_documents(tmp_path / "more", vectors[:3], ["d40", "d41", "d42"], collection=second.ref())
    for shards in (1, 3):
        root = tmp_path / f"index-{shards}"
        built = build_index("sparse-exact", vectors=tmp_path / "vectors", shards=shards, out=root)
        assert built.attributes["year"].to_pylist() == [YEARS[doc_id] for doc_id in shuffled]
        update_index(root, "add", vectors=more)
        update_index(root, "delete", ids=["d7", "d40"])
        years = YEARS | {"d40": 2040, "d41": None, "d42": 2042}
        wanted = {doc_id for doc_id, year in years.items() if year and year >= 2006} - {"d7", "d40"}
        for index in (Index.load(root), update_index(root, "compact")):
            query = vectors[:2]
            everything = hits(index, query, 40)
            found = hits(index, query, 40, index.matching(["year >= 2006"]))
            assert {doc_id for doc_id, _ in found[0]} == wanted  # term 0 is everyone's
            assert found == [[hit for hit in line if hit[0] in wanted] for line in everything]
            assert index.problems() == []
        assert set(index.manifest.inputs) >= {"collection", "collection_2"}


def test_documents_added_without_attributes_are_said_to_be_beyond_filters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection = make_attributed(tmp_path / "a", {"d1": 2001, "d2": 2002})
    write_documents(tmp_path / "vectors", sparse_documents(2), ["d1", "d2"], collection=collection.ref())
    build_index("sparse-exact", vectors=tmp_path / "vectors", out=tmp_path / "index")
    index = update_index(tmp_path / "index", "add", vectors=write_documents(tmp_path / "b", sparse_documents(1), ["x"]))
    assert any("no attributes, so that no filter finds them" in message for message in caplog.messages)
    found = index.matching(["year > 0"])
    assert found is not None and found.tolist() == [True, True, False]


def test_texts_of_added_documents_are_found(tmp_path: Path) -> None:
    """A searcher shows a document from the newest collection that has it."""
    first = make_attributed(tmp_path / "a", {"d1": 2001, "d2": 2002})
    second = make_attributed(tmp_path / "b", {"d13": 2013})
    write_documents(tmp_path / "vectors", sparse_documents(2), ["d1", "d2"], collection=first.ref())
    more = write_documents(tmp_path / "more", sparse_documents(1), ["d13"], collection=second.ref())
    build_index("sparse-exact", vectors=tmp_path / "vectors", out=tmp_path / "index")
    index = update_index(tmp_path / "index", "add", vectors=more)
    searcher = Searcher(index, None, first)
    shown = [searcher._hit(doc_id, 1.0).text for doc_id in ("d1", "d13", "d99")]
    assert shown == [document_text(1), document_text(13), None]
