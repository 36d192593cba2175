"""Titles, sentences, crops and logs, against queries worked out by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_queries
from tiny_queries import made_from, make, noted

from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import InputError, UsageError
from retrieval_kd.queries.make import estimate_queries, make_queries
from retrieval_kd.queries.sentences import sentences
from retrieval_kd.verify import check


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return tiny_queries.make_documents(tmp_path_factory.mktemp("kinds"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? four", ["One.", "Two!", "Three?", "four"]),
        ("small letters . all of it . yes", ["small letters .", "all of it .", "yes"]),
        ("Dr. Who met J. Smith, e.g. in Fig. 2. So.", ["Dr. Who met J. Smith, e.g. in Fig. 2.", "So."]),
        ('He "left." Then (so!) 3.5 km.', ['He "left."', "Then (so!)", "3.5 km."]),
        ("a heading\n\nIts text\ngoes on", ["a heading", "Its text goes on"]),
        ("你好。再见", ["你好。", "再见"]),
        (" \n\n ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_first_sentences(source: Collection, tmp_path: Path) -> None:
    made = make(source, tmp_path / "made", "first-sentence")
    assert made_from(made) == {
        "Search a sorted list.": ["d1"],
        "Stacks grow at one end, e.g. this one.": ["d2"],
        "another text about search without a full stop": ["d3"],
    }
    assert noted(made, "documents_without_query", "too_long") == (2, 0)
    short = make(source, tmp_path / "short", "first-sentence", max_words=7)
    assert made_from(short) == {"Search a sorted list.": ["d1"]}
    assert noted(short, "documents_without_query", "too_long") == (4, 2)


def test_sentences_at_random(source: Collection, tmp_path: Path) -> None:
    """Every sentence of 4 to 6 words: with two a document all of them, with one a choice that the seed decides."""
    both = make(source, tmp_path / "both", "ict", per_document=2, max_words=6)
    everything = {"Search a sorted list.", "It halves the list each time.", "So do w1 w2."}
    assert set(made_from(both)) == everything
    assert made_from(both)["So do w1 w2."] == ["d2"]
    first = {
        next(iter(made_from(make(source, tmp_path / f"{seed}", "ict", max_words=6, seed=seed)))) for seed in range(6)
    }
    assert first == {"Search a sorted list.", "It halves the list each time."}


def test_runs_of_words(collection: Collection, tmp_path: Path) -> None:
    """The tiny documents have four words: runs of two or three of them, of all lengths and from all places."""
    keys = {"crop": "words", "per_document": 4, "min_words": 2, "max_words": 3}
    made = make(collection, tmp_path / "made", "ict", **keys)
    seen = set()
    for text, documents in made_from(made).items():
        words = text.split()
        for doc_id in documents:
            of_document = collection.documents[int(doc_id[1:])].text.split()
            places = [i for i in range(4) if of_document[i : i + len(words)] == words]
            assert places, (text, doc_id)
            seen.add((len(words), places[0]))
    assert seen == {(2, 0), (2, 1), (2, 2), (3, 0), (3, 1)}
    assert check(made.path) == []
    fewer = make(collection, tmp_path / "fewer", "ict", **{**keys, "documents": 10})
    assert set(fewer.qrels("made")) and set(made_from(fewer)) <= set(made_from(made))
    again = make(collection, tmp_path / "again", "ict", **keys)
    assert (again.path / "queries.arrow").read_bytes() == (made.path / "queries.arrow").read_bytes()


def test_words_that_are_left_out(tmp_path: Path) -> None:
    """Of 3000 words about a fifth goes; those that stay keep their order."""
    words = [f"w{i}" for i in range(3000)]
    text = " ".join(words) + "."
    long = tiny_queries.make_documents(tmp_path, {"d1": ("", text), "d4": ("", "")}, splits=("test",))
    (query,) = made_from(make(long, tmp_path / "made", "ict", max_words=4000, delete=0.2))
    places = [int(word.strip("w.")) for word in query.split()]
    assert places == sorted(places)
    assert len(places) == pytest.approx(2400, abs=5 * np.sqrt(3000 * 0.2 * 0.8))


# ---- logs


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("log.txt", "one two\n\n  Three  four \r\nONE  two\nx\n", {}),
        ("log.tsv", "1\tone two\n\n2\t  Three  four \textra\r\n3\tONE  two\n4\tx\n", {}),
        ("log.tsv", "one two\n\nThree  four\t9\nONE  two\nx\n", {"column": 1}),
        ("log.jsonl", '{"q":"one two"}\n\n{"q":" Three  four"}\n{"q":"ONE  two"}\n{"q":"x"}\n', {"field": "q"}),
        ("log.txt.gz", "\ufeffone two\n\nThree four\nONE two\nx\n", {}),
    ],
)
def test_logs(name: str, content: str, keys: dict[str, object], source: Collection, tmp_path: Path) -> None:
    log = tmp_path / name
    log.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    made = make(source, tmp_path / "made", "query-log", log, min_words=2, **keys)
    assert made_from(made) == {"one two": ["line 1", "line 4"], "Three four": ["line 3"]}
    assert (made.splits, made.unjudged_splits) == (["test", "train"], ["made"])
    assert noted(made, "log_lines", "duplicates", "too_short", "synthetic_queries") == (4, 1, 1, 2)
    assert made.manifest.details["synthetic"]["made"] == {"kind": "query-log", "query_log": name}
    assert check(made.path) == []


def test_some_lines_of_a_log(source: Collection, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"query {i}\n" for i in range(100)))
    made = make(source, tmp_path / "made", "query-log", log, lines=10)
    lines = [origin.line for origin in made.origins]
    assert len(lines) == 10
    assert lines == sorted(lines, key=lambda line: line or 0)
    assert [int(text.split()[1]) + 1 for text in made.queries("made").values()] == lines
    found = estimate_queries("queries/query-log", collection=source, query_log=log, overrides=["lines=10"])
    assert found == {"log_lines": 100, "queries_at_most": 10}


def test_the_same_log_elsewhere_is_the_same_work(source: Collection, tmp_path: Path) -> None:
    first, second = tmp_path / "log.txt", tmp_path / "moved" / "log.txt"
    first.write_text("one two\n")
    made = make(source, tmp_path / "made", "query-log", first)
    second.parent.mkdir()
    first.rename(second)
    again = make(source, tmp_path / "made", "query-log", second)
    assert again.fingerprint == made.fingerprint
    second.write_text("three\n")
    with pytest.raises(InputError, match="made from another query_log"):
        make(source, tmp_path / "made", "query-log", second)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", b'{"text": "one"}\n{"text": \n', r"log.jsonl:2: not valid JSON"),
        ("log.jsonl", b'\n{"query": "one"}\n', r"log.jsonl:2: .* has no text 'text' \(--set field"),
        ("log.jsonl", b'{"text": 5}\n', "log.jsonl:1: .* has no text 'text'"),
        ("log.jsonl", b"[" * 100_000, "log.jsonl:1: not valid JSON"),
        ("log.jsonl", b"[1]\n", "log.jsonl:1: .* has no text 'text'"),
        ("log.tsv", b"1\tone\n2\n", r"log.tsv:2: 1 tab-separated columns, the query is in column 2"),
        ("log.txt", b"one\n\xff\n", "log.txt:2: not valid UTF-8"),
        ("log.txt.gz", b"not gzip", "log.txt.gz: damaged gzip file"),
        ("log.csv", b"one\n", r"log.csv: a query log ends in .txt, .tsv, .jsonl"),
        ("log.txt", b"\n \n", r"kind 'query-log' made no query \(nothing to read\)"),
    ],
)
def test_logs_that_cannot_be(name: str, content: bytes, message: str, source: Collection, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        make(source, tmp_path / "made", "query-log", tmp_path / name)


def test_a_log_that_is_not_there(source: Collection, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.txt: no such file"):
        make(source, tmp_path / "made", "query-log", tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="give --query-log FILE"):
        make_queries("queries/query-log", collection=source, out=tmp_path / "made")


def test_half_a_sign_is_counted(source: Collection, tmp_path: Path) -> None:
    """JSON can spell what is no text: it is left out, and the rest stays."""
    (tmp_path / "log.jsonl").write_text(json.dumps({"text": "half \ud83d"}) + '\n{"text": "whole 😀"}\n')
    made = make(source, tmp_path / "made", "query-log", tmp_path / "log.jsonl")
    assert made_from(made) == {"whole 😀": ["line 2"]}
    assert noted(made, "invalid_unicode") == (1,)


def test_punctuation_is_no_query(tmp_path: Path) -> None:
    """Titles and sentences of signs alone are counted; digits and any script are words; a byte order mark goes."""
    documents = {
        "d1": ("…", "?! Then a sentence."),
        "d2": ("\ufeff Lists", "\ufeffSort it. Then search it."),
        "d3": ("42", "再见。"),
        "d4": ("\ufeff", "— –"),
    }
    source = tiny_queries.make_documents(tmp_path, documents, splits=())
    titles = make(source, tmp_path / "titles", "title")
    assert made_from(titles) == {"Lists": ["d2"], "42": ["d3"]}
    assert noted(titles, "no_letter_or_digit", "too_short", "documents_without_query") == (1, 1, 2)
    sentences = make(source, tmp_path / "sentences", "first-sentence")
    assert made_from(sentences) == {"Sort it.": ["d2"], "再见。": ["d3"]}
    assert noted(sentences, "no_letter_or_digit", "documents_without_query") == (2, 2)
