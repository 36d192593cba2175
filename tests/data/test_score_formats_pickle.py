"""Pickles: plain ones are read, and whatever else one asks for is refused before it runs."""

from __future__ import annotations

import builtins
import collections
import gzip
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_score_files import bits, bits_of

from retrieval_kd.data.score_formats.convert import convert_scores
from retrieval_kd.data.scores import Scores
from retrieval_kd.errors import DataError

PLAIN = {1: {10: 0.5, "d2": 2}, "q2": {"d1": -1.25, "d3": 0.1}}


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def imported(path: Path, content: bytes) -> Scores:
    path.write_bytes(content)
    found = convert_scores(path, from_format="st-pickle", to_format="retrieval-kd", out=path.with_suffix(".scores"))
    assert isinstance(found, Scores)
    return found


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles(protocol: int, tmp_path: Path) -> None:
    expected = bits_of([("1", ["10", "d2"], [0.5, 2]), ("q2", ["d1", "d3"], [-1.25, 0.1])])
    content = pickle.dumps(PLAIN, protocol)
    assert bits(imported(tmp_path / "x.pickle", content)) == expected
    assert bits(imported(tmp_path / "x.pkl.gz", gzip.compress(content))) == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_of_a_malicious_pickle_runs(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    attacks = [
        (Runs(os.system, f"touch {mark}"), "posix.system"),
        (Runs(builtins.eval, f"open({str(mark)!r}, 'w')"), ".eval"),
        (Runs(getattr, "x", "upper"), ".getattr"),
        (collections.OrderedDict(a=1.0), "collections.OrderedDict"),
        (np.float32(1), "numpy"),
        (np.array([{}], dtype=object), "numpy"),
    ]
    for attack, name in attacks:
        for content in (attack, {"q": {"d": attack}}, [{"q": {"d": 1.0}}, attack]):
            with pytest.raises(DataError, match=rf"x\.pkl: refused pickle \(it asks for .*{name}") as caught:
                imported(tmp_path / "x.pkl", pickle.dumps(content, protocol))
            assert "only plain dicts, strings and numbers" in str(caught.value)
    assert not mark.exists() and not (tmp_path / "x.scores").exists()


def test_persistent_objects_are_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return "storage" if obj == 7.0 else None

    for protocol in (0, 4):
        file = io.BytesIO()
        Pickler(file, protocol).dump({"q": {"d": 7.0}})
        with pytest.raises(DataError, match=r"refused pickle .*persistent object 'storage'"):
            imported(tmp_path / "x.pkl", file.getvalue())


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'touch mark'\ntR.",
        b"(ios\nsystem\n.",
        b"(S'os'\nS'system'\n\x93.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02\x82\x01.",
        b"(S'x'\no.",
        b"\x80\x02}}\x81.",
    ],
)
def test_opcodes_written_by_hand(opcodes: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refused pickle"):
        imported(tmp_path / "x.pkl", opcodes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a pickled list, not {query id"),
        ({"q": [("d", 1.0)]}, r"entry 0: query 'q' has \[.*, not {document id: score}"),
        ({"p": {"d": 1.0}, "q": {"d": True}}, "entry 1: score True is not a number"),
        ({"q": {"d": "1.0"}}, "score '1.0' is not a number"),
        ({"q": {("d",): 1.0}}, r"document id \('d',\) is neither a string nor a whole number"),
        ({True: {"d": 1.0}}, "query id True is neither"),
        ({"q": {"d": float("nan")}}, "query 'q', document 'd': score nan is not finite"),
        ({"q": {"d": 1e39}}, "score inf is not finite"),
        ({"q": {"d": 10**400}}, "score inf is not finite"),
        ({"q": {"": 1.0}}, "the document id is empty"),
        ({1: {"d": 1.0}, "1": {"d": 2.0}}, "entry 0 and .*entry 1: query '1', document 'd' has two scores"),
        ({}, "no scored pairs"),
    ],
)
def test_plain_pickles_of_something_else(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"x\.pkl.*{message}"):
        imported(tmp_path / "x.pkl", pickle.dumps(content))


def test_damaged_pickles(tmp_path: Path) -> None:
    whole = pickle.dumps(PLAIN)
    for content in (b"", b"hello", whole[:-5], whole[:9] + b"\xff" + whole[10:]):
        with pytest.raises(DataError, match="refused pickle"):
            imported(tmp_path / "x.pkl", content)
