from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from retrieval_kd.artifact import (
    FORMATS,
    MANIFEST,
    OLDEST,
    Artifact,
    InputRef,
    Manifest,
    damaged_files,
    is_artifact,
    resolve,
)
from retrieval_kd.atomic import publish, write_atomically
from retrieval_kd.errors import ArtifactError, OutputExistsError, UsageError
from retrieval_kd.fingerprint import directory_fingerprint
from retrieval_kd.plan import Plan
from retrieval_kd.verify import check

REPOSITORY = Path(__file__).parent.parent
SHA256_OF_HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


class Vectors(Artifact):
    kind = "vectors"


def plan(recipe: dict[str, Any] | None = None, **inputs: InputRef) -> Plan:
    return Plan("vectors", recipe or {"kind": "toy", "size": 1}, inputs)


def write(out: Path, content: str = "hello", *, of: Plan | None = None, **options: Any) -> Vectors:
    with (of or plan()).write(out, **options) as draft:
        (draft.path / "data.txt").write_text(content)
        draft.counts["letters"] = len(content)
    return Vectors.load(out)


def flip_byte(path: Path, at: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def in_a_child(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs code after the definitions above, in a process of its own."""
    head = f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]\n"
    code = head + "from test_artifact import *\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_a_finished_artifact_says_what_it_holds(tmp_path: Path) -> None:
    made = write(tmp_path / "out")
    assert made.manifest.artifact == "vectors"
    assert made.manifest.counts == {"letters": 5}
    assert made.manifest.files == {"data.txt": {"bytes": 5, "sha256": SHA256_OF_HELLO}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data.txt", MANIFEST]


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(path: Path, data: bytes) -> None:
        if path.name == MANIFEST:
            seen.append(sorted(entry.name for entry in path.parent.iterdir()))
        write_atomically(path, data)

    monkeypatch.setattr("retrieval_kd.plan.write_atomically", spy)
    write(tmp_path / "out")
    assert seen == [[".lock", "data.txt", "plan.json"]]


def test_without_a_manifest_it_is_no_artifact(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).unlink()
    assert not is_artifact(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"out: not an artifact \(no manifest.json\)"):
        Vectors.load(tmp_path / "out")
    with pytest.raises(ArtifactError, match="none: no such file or directory"):
        Vectors.load(tmp_path / "none")


def test_a_flipped_byte_in_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out")
    flip_byte(tmp_path / "out" / "data.txt")
    with pytest.raises(ArtifactError, match=r"out: data.txt differs from its checksum; make the artifact again"):
        Vectors.load(tmp_path / "out")
    assert check(tmp_path / "out") == [f"{tmp_path / 'out'}: data.txt differs from its checksum"]


def test_missing_and_shortened_files_are_found_without_checksums(tmp_path: Path) -> None:
    with plan().write(tmp_path / "out") as draft:
        (draft.path / "a").write_text("hello")
        (draft.path / "b").write_text("hello")
    (tmp_path / "out" / "a").unlink()
    (tmp_path / "out" / "b").write_text("hell")
    problems = damaged_files(tmp_path / "out", Manifest.read(tmp_path / "out"), checksums=False)
    assert problems == ["a is missing", "b has 4 bytes, 5 were written"]


def test_every_flipped_byte_of_the_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    original = path.read_bytes()
    for at in range(0, len(original), 37):
        flip_byte(path, at)
        if path.read_bytes().split() != original.split():  # white space between tokens says nothing
            with pytest.raises(ArtifactError):
                Vectors.load(tmp_path / "out")
            assert len(check(tmp_path / "out")) == 1
        path.write_bytes(original)
    Vectors.load(tmp_path / "out")


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "vectors", 2)
    with plan().write(tmp_path / "out"):
        pass
    monkeypatch.setitem(FORMATS, "vectors", 1)
    with pytest.raises(ArtifactError, match="vectors format 2 is newer than this version reads; upgrade"):
        Vectors.load(tmp_path / "out")


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    class Index(Artifact):
        kind = "index"

    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="out: holds vectors; an index is needed here"):
        Index.load(tmp_path / "out")


def test_the_same_work_is_finished_and_other_work_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = InputRef("a" * 64)
    assert not plan().finished(out)
    write(out, of=plan(model=model))
    assert plan(model=model).finished(out)
    with pytest.raises(OutputExistsError, match="out exists and was made from another model; choose another --out"):
        plan(model=InputRef("b" * 64)).finished(out)
    with pytest.raises(OutputExistsError, match=r"was made from another recipe \(size differ\)"):
        plan({"kind": "toy", "size": 2}, model=model).finished(out)
    with pytest.raises(OutputExistsError, match="was made from something else: it is a vectors"):
        Plan("run", {"kind": "toy", "size": 1}, {"model": model}).finished(out)
    assert not plan({"kind": "toy", "size": 2}).finished(out, force=True)
    (out / "data.txt").unlink()
    with pytest.raises(OutputExistsError, match="out exists and is damaged"):
        plan(model=model).finished(out)


@pytest.mark.parametrize("what", ["file", "empty directory"])
def test_something_that_is_no_artifact_is_replaced_only_by_force(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    out.write_text("mine") if what == "file" else out.mkdir()
    with pytest.raises(OutputExistsError, match="is not a finished artifact; pass --force"):
        plan().finished(out)
    assert not plan().finished(out, force=True)
    write(out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_and_the_old_one_survives_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = write(out, "old")
    with pytest.raises(ZeroDivisionError), plan({"size": 2}).write(out, force=True) as draft:
        (draft.path / "data.txt").write_text("new")
        _ = 1 / 0
    assert Vectors.load(out).fingerprint == old.fingerprint
    assert (out / "data.txt").read_text() == "old"
    assert write(out, "new", of=plan({"size": 2}), force=True).fingerprint != old.fingerprint
    assert (out / "data.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_after(out: Path, file: str, of: Plan, *, resumable: bool) -> bool:
    """Writes a file into a draft and fails; says whether former work was found."""
    with pytest.raises(ZeroDivisionError), of.write(out, resumable=resumable) as draft:
        (draft.work / file).write_text("x")
        resumed = draft.resumed
        _ = 1 / 0
    return resumed


def test_work_that_cannot_resume_starts_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    assert not fail_after(out, "a", plan(), resumable=False)
    assert [path.name for path in partial.iterdir()] == [".lock"]
    (partial / "left.txt").write_text("from a killed process")
    with plan().write(out) as draft:
        assert not draft.resumed
        assert not (draft.path / "left.txt").exists()


def test_resumable_work_finds_its_files_and_they_are_not_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not fail_after(out, "a", plan(), resumable=True)
    assert fail_after(out, "b", plan(), resumable=True)
    with pytest.raises(ArtifactError, match="not finished; run the command that makes it again, it goes on from"):
        Vectors.load(out)
    with plan().write(out, resumable=True) as draft:
        assert draft.resumed
        assert sorted(path.name for path in draft.work.iterdir()) == ["a", "b"]
        (draft.path / "data.txt").write_text("hello")
    assert sorted(path.name for path in out.iterdir()) == ["data.txt", MANIFEST]


def test_unfinished_work_of_another_plan_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_after(out, "a", plan(), resumable=True)
    with (
        pytest.raises(OutputExistsError, match="holds unfinished work of another recipe"),
        plan({"size": 2}).write(out, resumable=True),
    ):
        pytest.fail("the block must not run")
    with plan({"size": 2}).write(out, resumable=True, force=True) as draft:
        assert not draft.resumed
        assert list(draft.work.iterdir()) == []


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with plan().write(out):
        child = in_a_child(
            f"""
            try:
                write(Path({str(out)!r}))
            except OutputExistsError as error:
                print(error)
            """
        )
    assert child.stdout == f"{out}.partial: another process is writing it; wait for it to end\n", child.stderr


def test_a_killed_process_leaves_only_the_partial(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = in_a_child(
        f"""
        import os
        with plan().write(Path({str(out)!r}), resumable=True) as draft:
            (draft.path / "data.txt").write_text("hel")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not out.exists()
    assert (tmp_path / "out.partial" / "data.txt").read_text() == "hel"
    with plan().write(out, resumable=True) as draft:
        assert draft.resumed
        (draft.path / "data.txt").write_text("hello")
    assert Vectors.load(out).manifest.files["data.txt"]["sha256"] == SHA256_OF_HELLO


def test_a_full_disk_is_a_clear_error_and_the_old_artifact_survives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = write(out, "old")
    child = in_a_child(
        f"""
        import resource
        from retrieval_kd.errors import RetrievalKDError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write(Path({str(out)!r}), "x" * 100_000, of=plan({{"size": 2}}), force=True)
        except RetrievalKDError as error:
            print(error.exit_code, error)
        """
    )
    assert child.stdout.startswith(f"1 {out}: the disk is full (File too large); what was there before is"), child
    assert Vectors.load(out).fingerprint == old.fingerprint
    assert (tmp_path / "out.partial" / "data.txt").exists() is False


def test_current_names_the_generation(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = write(out, generation="gen-000001")
    assert (out / "CURRENT").read_text() == "gen-000001\n"
    assert made.path == out / "gen-000001"
    assert made.ref().path == out
    assert resolve(out) == out / "gen-000001"
    assert sorted(path.name for path in out.iterdir()) == ["CURRENT", "gen-000001"]
    assert plan().finished(out)
    (out / "CURRENT").write_text("gen-000009\n")
    with pytest.raises(ArtifactError, match="names generation 'gen-000009', which is not there"):
        Vectors.load(out)


def write_with_input(tmp_path: Path) -> tuple[Vectors, Vectors]:
    model = write(tmp_path / "runs" / "model", "a model")
    return model, write(tmp_path / "runs" / "made" / "vectors", of=plan(model=model.ref()))


def test_an_input_is_found_beside_its_output_after_the_tree_moved(tmp_path: Path) -> None:
    model, made = write_with_input(tmp_path)
    assert made.locate("model") == model.path
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = Vectors.load(tmp_path / "moved" / "made" / "vectors")
    assert moved.locate("model") == tmp_path / "moved" / "model"


def test_an_input_is_found_at_its_absolute_path_when_the_output_moved(tmp_path: Path) -> None:
    model, made = write_with_input(tmp_path)
    made.path.rename(tmp_path / "vectors")
    assert Vectors.load(tmp_path / "vectors").locate("model") == model.path


def test_a_wrong_or_lost_input_is_refused(tmp_path: Path) -> None:
    model, made = write_with_input(tmp_path)
    other = write(tmp_path / "other", "another model")
    with pytest.raises(ArtifactError, match=r"other is not the model that .*vectors was made with"):
        made.locate("model", other.path)
    copy = tmp_path / "copy"
    shutil.move(model.path, copy)
    with pytest.raises(ArtifactError, match=r"its model .* is not at .* any more; give its new place with --model"):
        made.locate("model")
    assert made.locate("model", copy) == copy
    shutil.copytree(other.path, model.path)
    with pytest.raises(ArtifactError, match="is not at"):
        made.locate("model")
    with pytest.raises(ArtifactError, match="was made without a collection; give one with --collection"):
        made.locate("collection")


def test_the_fingerprint_says_content_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 1, 1, tzinfo=UTC)

    first = write(tmp_path / "first")
    monkeypatch.setattr("retrieval_kd.plan.datetime", Later)
    second = write(tmp_path / "second")
    assert second.manifest.created == "2031-01-01T00:00:00+00:00" != first.manifest.created
    assert second.fingerprint == first.fingerprint
    assert write(tmp_path / "content", "hellO").fingerprint != first.fingerprint
    assert write(tmp_path / "recipe", of=plan({"size": 2})).fingerprint != first.fingerprint
    assert write(tmp_path / "input", of=plan(model=InputRef("a" * 64))).fingerprint != first.fingerprint


def test_a_crash_between_the_two_renames_is_recovered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = write(out, "old")
    out.rename(tmp_path / "out.former")
    assert plan().finished(out)
    assert Vectors.load(out).fingerprint == old.fingerprint
    assert not (tmp_path / "out.former").exists()


def test_a_crash_after_the_second_rename_does_not_stop_the_next_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / "out.former", "older")
    write(out, "old")
    assert write(out, "new", of=plan({"size": 2}), force=True).manifest.counts == {"letters": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="is not a finished artifact"):
        plan().finished(Path())
    with pytest.raises(UsageError, match="/: cannot be an output"):
        plan().finished(Path("/"))


def test_damaged_json_of_a_plan_is_not_trusted(tmp_path: Path) -> None:
    write(tmp_path / "out")
    raw = json.loads((tmp_path / "out" / MANIFEST).read_text())
    raw["recipe"]["size"] = 2
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="its own checksum differs"):
        Vectors.load(tmp_path / "out")


def test_a_stock_directory_is_known_by_names_and_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "weights").write_text("hello")
    assert directory_fingerprint(tmp_path / "a") == directory_fingerprint(tmp_path / "b")
    (tmp_path / "b" / "sub" / "weights").rename(tmp_path / "b" / "weights")
    assert directory_fingerprint(tmp_path / "a") != directory_fingerprint(tmp_path / "b")


def test_a_crash_between_sealing_and_renaming_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is whole: the next run renames it instead of doing the work again."""
    out = tmp_path / "out"

    def crashes(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("retrieval_kd.plan.publish", crashes)
        write(out, resumable=True)
    assert not out.exists() and is_artifact(tmp_path / "out.partial")
    assert plan().finished(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["data.txt", MANIFEST]
    assert Vectors.load(out).manifest.counts == {"letters": 5}


def test_a_crash_while_sealing_keeps_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval_kd.plan.file_sha256", crashes)
    with pytest.raises(KeyboardInterrupt), plan().write(tmp_path / "out", resumable=True) as draft:
        (draft.path / "data.txt").write_text("hello")
        (draft.work / "encoded").write_text("hours of work")
    assert (tmp_path / "out.partial" / "work" / "encoded").read_text() == "hours of work"


def test_the_draft_is_locked_until_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that comes in between neither empties the draft nor does the work again."""
    out = tmp_path / "out"

    def another_process_comes(partial: Path, final: Path) -> None:
        found = in_a_child(f"write(Path({str(out)!r}), resumable=True)")
        assert "another process is writing it" in found.stderr
        publish(partial, final)

    monkeypatch.setattr("retrieval_kd.plan.publish", another_process_comes)
    write(out, resumable=True)
    with pytest.raises(OutputExistsError, match="another process has finished it meanwhile"):
        write(out, resumable=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_format_that_is_not_read_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    monkeypatch.setitem(OLDEST, "vectors", 2)
    with pytest.raises(ArtifactError, match="vectors format 1 is older than this version reads; make it again"):
        Vectors.load(tmp_path / "out")
