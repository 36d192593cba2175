from __future__ import annotations

from pathlib import Path

import pytest
from pets import CORPUS, QUERIES, write_jsonl

from retrieval_kd.data.beir import BeirSource
from retrieval_kd.data.sources import make_collection
from retrieval_kd.errors import DataError, InputError


def refused(beir: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_collection(str(beir), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attribute_types(beir: Path, tmp_path: Path) -> None:
    write_jsonl(
        beir / "corpus.jsonl",
        [
            {"_id": "d1", "text": "a", "n": 1, "f": 1, "b": True, "mix": 1, "nest": {"x": [1]}, "id": "z", "e": {}},
            {"_id": "d3", "text": "b", "n": 2, "f": 0.5, "b": False, "mix": "one", "nest": ["ä"], "none": None},
            {"_id": "d4", "text": "c", "mix": {"k": 1}, "big": 2**63, "flag": 1},
            {"_id": "d2", "text": "d", "flag": True},
        ],
    )
    assert BeirSource(beir).attributes() == {
        "n": "int64",
        "f": "float64",
        "b": "bool",
        "mix": "string",
        "nest": "string",
        "id": "string",
        "big": "string",
        "flag": "string",
    }
    documents = make_collection(str(beir), tmp_path / "out").documents
    assert documents.attributes == ["n", "f", "b", "mix", "nest", "id_", "big", "flag"]
    first, second, third, fourth = (document.attributes for document in documents)
    assert first == {
        "n": 1, "f": 1.0, "b": True, "mix": "1", "nest": '{"x": [1]}', "id_": "z", "big": None, "flag": None,
    }  # fmt: skip
    assert (second["f"], second["mix"], second["nest"]) == (0.5, "one", '["ä"]')
    assert (third["n"], third["mix"], third["big"], third["flag"]) == (None, '{"k": 1}', "9223372036854775808", "1")
    assert fourth["flag"] == "true"


def test_a_header_is_optional_and_blank_lines_are_skipped(beir: Path, tmp_path: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text("q1\td1\t1\n\nq1\td2\t-1\r\n")
    (beir / "queries.jsonl").write_bytes(b"\xef\xbb\xbf" + (beir / "queries.jsonl").read_bytes() + b"\n")
    made = make_collection(str(beir), tmp_path / "out")
    assert made.qrels("test") == {"q1": {"d1": 1, "d2": -1}}
    assert list(made.queries("all")) == ["q2", "q1", "q3"]


def test_missing_title_is_empty(beir: Path, tmp_path: Path) -> None:
    write_jsonl(beir / "corpus.jsonl", [{"_id": f"d{i}", "title": None, "text": f"t{i}"} for i in (1, 3, 4)])
    assert make_collection(str(beir), tmp_path / "out").documents.texts([0, 1, 2]) == ["t1", "t3", "t4"]


def test_no_qrels(beir: Path, tmp_path: Path) -> None:
    for path in (beir / "qrels").iterdir():
        path.unlink()
    made = make_collection(str(beir), tmp_path / "out")
    assert made.splits == []
    assert len(made.queries("all")) == 3
    with pytest.raises(InputError, match="it has no judged split"):
        made.qrels("test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d9", ', r"corpus\.jsonl:6: not valid JSON"),
        ("[1]", r"corpus\.jsonl:6: '\[1\]' is not a JSON object"),
        ('{"_id": "d9"}', r"corpus\.jsonl:6: no 'text'"),
        ('{"_id": "d9", "text": 5}', r"corpus\.jsonl:6: 'text' is 5, not a string"),
        ('{"_id": "d9", "text": null}', r"corpus\.jsonl:6: 'text' is null, not a string"),
        ('{"_id": 9, "text": ""}', r"corpus\.jsonl:6: '_id' is 9, not a string"),
        ('{"_id": "", "text": "a"}', r"corpus\.jsonl:6: the id is empty"),
        ('{"_id": "d9", "text": "\\ud800"}', r"corpus\.jsonl:6: '\\ud800' is not valid Unicode"),
        ('{"_id": "d1", "text": "x"}', r"corpus\.jsonl:6: document id 'd1' is already at .*corpus\.jsonl:1"),
    ],
)
def test_bad_documents(beir: Path, tmp_path: Path, line: str, message: str) -> None:
    with (beir / "corpus.jsonl").open("a") as file:
        file.write(line + "\n")
    refused(beir, tmp_path, message)


def test_bad_utf8(beir: Path, tmp_path: Path) -> None:
    with (beir / "corpus.jsonl").open("ab") as file:
        file.write(b'{"_id": "d9", "text": "\xff"}\n')
    refused(beir, tmp_path, r"corpus\.jsonl:6: not valid UTF-8")


def test_all_repetitions_are_counted(beir: Path, tmp_path: Path) -> None:
    write_jsonl(beir / "corpus.jsonl", [*CORPUS, CORPUS[1], CORPUS[0]])
    refused(beir, tmp_path, r"corpus\.jsonl:6: document id 'd3' .*corpus\.jsonl:2; ids are unique; 2 repetitions")


def test_repeated_query(beir: Path, tmp_path: Path) -> None:
    write_jsonl(beir / "queries.jsonl", [*QUERIES, QUERIES[1]])
    refused(beir, tmp_path, r"queries\.jsonl:4: query id 'q1' is already at .*queries\.jsonl:2")


def test_empty_corpus(beir: Path, tmp_path: Path) -> None:
    (beir / "corpus.jsonl").write_text("\n")
    refused(beir, tmp_path, "pets: there are no documents")
    with pytest.raises(DataError, match="there are no documents"):
        make_collection(str(beir), tmp_path / "out", sample=3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("q1\td1\n", r"test\.tsv:5: 2 tab-separated columns"),
        ("q1\td2\thigh\n", r"test\.tsv:5: score 'high' is not a whole number"),
        ("q1\td2\t99999999999\n", r"test\.tsv:5: score 99999999999 does not fit"),
        ("q1\td1\t1\n", r"test\.tsv:5: query 'q1' and document 'd1' were judged 2 before and 1 here"),
        ("q1\tx\t1\nq2\ty\t1\nq2\tx\t1\n", r"test\.tsv:5: .*'test' name 2 unknown document ids: 'x', 'y'$"),
        ("q8\td1\t1\nq9\td1\t1\nq9\td3\t1\n", r"test\.tsv:5: .*'test' name 2 unknown query ids: 'q8', 'q9'$"),
    ],
)
def test_bad_qrels(beir: Path, tmp_path: Path, lines: str, message: str) -> None:
    with (beir / "qrels" / "test.tsv").open("a") as file:
        file.write(lines)
    refused(beir, tmp_path, message)


def test_the_same_judgement_twice_is_counted(beir: Path, tmp_path: Path) -> None:
    with (beir / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\td1\t2\n")
    made = make_collection(str(beir), tmp_path / "out")
    assert (made.manifest.counts["repeated_qrels"], made.manifest.counts["qrels_test"]) == (1, 3)


def test_a_split_without_judgements(beir: Path, tmp_path: Path) -> None:
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n")
    refused(beir, tmp_path, "split 'dev' has no judgements")


def test_a_split_called_all(beir: Path, tmp_path: Path) -> None:
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "all.tsv")
    refused(beir, tmp_path, "a split cannot be called 'all'")


def test_missing_queries(beir: Path, tmp_path: Path) -> None:
    (beir / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"queries\.jsonl: not there"):
        make_collection(str(beir), tmp_path / "out")
