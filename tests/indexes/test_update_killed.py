"""An update that is killed before any change on disk leaves the old index or the new one, and the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tiny_indexes import sparse_documents, write_documents

from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.update import update_index

HERE = Path(__file__).parent

PROGRAM = """
import itertools, json, os, shutil, signal, sys
from pathlib import Path
from tiny_indexes import hits, sparse_documents
from retrieval_kd.artifact import damaged_files
from retrieval_kd.errors import InputError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.update import update_index

os.fsync = lambda file: None  # a killed process loses nothing that it has written; it takes most of the time
CHANGES = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"}
watch = None

def before_a_change(event, arguments):
    global watch
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if watch is not None and (event in CHANGES or writes):
        act, watch = watch, None  # what it does itself is no change
        act()
        watch = act

def found(index):
    assert index.problems() == []
    return hits(index, sparse_documents(3, seed=8), 30)

def names(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))

def killed_everywhere(folder, action, given):
    # Whether the old or the new generation was there after a kill before each change.
    global watch
    root = folder / "index"
    shutil.copytree(root, folder / "really-killed")
    first = Index.load(root)
    old, seen, steps = found(first), [], itertools.count()
    watch = lambda: shutil.copytree(root, folder / f"killed-{next(steps)}")  # all that a kill would leave
    updated, watch = update_index(root, action, **given), None
    new, number = found(updated), next(steps)
    for step in range(number):
        killed = folder / f"killed-{step}"
        if step == number // 2:
            really_kill(folder / "really-killed", step, action, given)
            assert names(killed) == names(folder / "really-killed")
            killed = folder / "really-killed"
        index = Index.load(killed)  # its checksums hold, too
        state = "new" if index.path.name > first.path.name else "old"
        assert found(index) == (new if state == "new" else old), step
        seen.append(state)
        try:
            again = update_index(killed, action, **given)
            assert state == "old" or action == "compact", step
            assert found(again) == new, step
        except InputError as error:
            assert state == "new" and ("in it already" in str(error) or "not in it" in str(error)), (step, error)
            again = update_index(killed, "delete", ids=["d2"])
        assert not damaged_files(again.path, again.manifest), step
        left_over = [path.name for path in killed.iterdir() if path.suffix == ".partial" or path.name == "update.json"]
        assert not left_over and len(list(killed.glob("gen-*"))) <= 2, (step, left_over)
    return seen

def really_kill(root, step, action, given):
    global watch
    steps = itertools.count()
    child = os.fork()
    if child == 0:
        watch = lambda: next(steps) == step and os.kill(os.getpid(), signal.SIGKILL)
        update_index(root, action, **given)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

sys.addaudithook(before_a_change)
plan = json.loads(sys.argv[2])
print(json.dumps({name: killed_everywhere(Path(sys.argv[1]) / name, name, plan[name]) for name in plan}))
"""


def test_killed_before_every_change_on_disk(tmp_path: Path) -> None:
    """The state before the kill is always one of the two, first the old one only, then the new one only."""
    first = write_documents(tmp_path / "first", sparse_documents(12), [f"d{row}" for row in range(12)])
    more = write_documents(tmp_path / "more", sparse_documents(4, seed=4), ["a", "b", "c", "d"])
    plan = {"add": {"vectors": str(more.path)}, "delete": {"ids": ["d1", "d5"]}, "compact": {}}
    for action in plan:
        build_index("sparse-exact", vectors=first, out=tmp_path / action / "index")
    for action in ("delete", "compact"):
        update_index(tmp_path / action / "index", "delete", ids=["d3"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(plan)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert list(states) == list(plan)
    for seen in states.values():
        assert len(seen) > 20 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


SHARDS = """
import os, signal, sys
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.sparse_exact import SparseExactIndex

build, built = SparseExactIndex.build.__func__, []

def build_or_die(cls, recipe, source, draft):
    if len(built) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    build(cls, recipe, source, draft)
    built.append(source.vectors.ids)

SparseExactIndex.build = classmethod(build_or_die)
build_index("sparse-exact", vectors=sys.argv[1], shards=4, out=sys.argv[2])
print([ids[0] for ids in built])
"""


def test_a_sharded_build_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    vectors = write_documents(tmp_path / "vectors", sparse_documents(10), [f"d{row}" for row in range(10)])
    whole = build_index("sparse-exact", vectors=vectors, shards=4, out=tmp_path / "whole")

    def start(most: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SHARDS, str(vectors.path), str(tmp_path / "index"), str(most)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert start(2).returncode == -signal.SIGKILL
    assert not (tmp_path / "index").exists()
    done = start(9)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['d5', 'd7']"  # shards of 2, 3, 2, 3 documents: the first two were whole
    again = Index.load(tmp_path / "index")
    assert again.fingerprint == whole.fingerprint and again.problems() == []
