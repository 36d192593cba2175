"""Documents added and deleted: the hits of an index built afresh, and whole generations whatever happens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from scipy.sparse import csr_array
from tiny import make_tiny_collection, unit
from tiny_indexes import all_scores, best, hits, sparse_documents, write_documents

from retrieval_kd.artifact import Artifact, InputRef
from retrieval_kd.data.collection import Collection
from retrieval_kd.errors import ArtifactError, InputError, OutputExistsError, RetrievalKDError, UsageError
from retrieval_kd.indexes.base import Index
from retrieval_kd.indexes.build import build_index
from retrieval_kd.indexes.segments import Segments
from retrieval_kd.indexes.update import update_index
from retrieval_kd.verify import check, lost_inputs

QUERIES = sparse_documents(5, seed=8)


def names(start: int, stop: int) -> list[str]:
    return [f"d{row}" for row in range(start, stop)]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A sparse-exact index of d0 to d19."""
    vectors = write_documents(tmp_path / "vectors", sparse_documents(20), names(0, 20))
    build_index("sparse-exact", vectors=vectors, out=tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Vectors of d20 to d29."""
    write_documents(tmp_path / "more", sparse_documents(10, seed=4), names(20, 30))
    return tmp_path / "more"


def state(index: Path) -> dict[str, int]:
    """Every file of an index and its inode; the lock is no part of it."""
    found = (path for path in index.rglob("*") if path.is_file() and path.name != ".update.lock")
    return {str(path.relative_to(index)): path.stat().st_ino for path in found}


def values(kind: str) -> tuple[Any, Any, str]:
    """Thirty documents and four queries of a kind of index, and how they are compared."""
    rng = np.random.default_rng(1)
    if kind == "sparse-exact":
        return sparse_documents(30), sparse_documents(4, seed=9), "dot"
    if kind == "maxsim-exact":
        tokens = [unit(rng.standard_normal((rng.integers(1, 5), 4))).astype(np.float32) for _ in range(34)]
        return tokens[:30], tokens[30:], "maxsim"
    matrix = rng.integers(-2, 3, (34, 6)).astype(np.float32)  # whole numbers: scores tie
    return matrix[:30], matrix[30:], "dot"


@pytest.mark.parametrize("kind", ["sparse-exact", "flat", "maxsim-exact"])
@pytest.mark.parametrize("shards", [1, 3])
def test_added_deleted_and_compacted_equals_an_index_built_afresh(kind: str, shards: int, tmp_path: Path) -> None:
    documents, queries, similarity = values(kind)
    first = write_documents(tmp_path / "first", documents[:18], names(0, 18), similarity)
    second = write_documents(tmp_path / "second", documents[18:], names(18, 30), similarity)
    build_index(kind, vectors=first, shards=shards, out=tmp_path / "index")
    update_index(tmp_path / "index", "add", vectors=second)
    changed = update_index(tmp_path / "index", "delete", ids=["d3", "d29", "d17", "d18"])
    kept = [row for row in range(30) if row not in (3, 17, 18, 29)]
    live = [documents[row] for row in kept] if isinstance(documents, list) else documents[kept]
    ids = [f"d{row}" for row in kept]
    expected = best(all_scores(queries, live, similarity), ids, 30)
    assert [[i for i, _ in line] for line in hits(changed, queries, 30)] == [[i for i, _ in line] for line in expected]
    assert isinstance(changed, Segments) and len(changed.segments) == shards + 1
    assert (changed.manifest.counts["documents"], changed.manifest.counts["deleted"]) == (26, 4)
    compacted = update_index(tmp_path / "index", "compact")
    fresh_vectors = write_documents(tmp_path / "fresh-vectors", live, ids, similarity)
    fresh = build_index(kind, vectors=fresh_vectors, out=tmp_path / "fresh")
    for k in (1, 7, 30):
        assert hits(compacted, queries, k) == hits(fresh, queries, k) == hits(changed, queries, k)
    assert compacted.manifest.counts == {**fresh.manifest.counts, "documents": 26}
    assert isinstance(compacted, Segments) == (shards > 1)
    assert compacted.exact and check(tmp_path / "index") == []


def test_a_deleted_id_comes_back_with_another_vector(index: Path, tmp_path: Path) -> None:
    """d7 is now the only document with term 11 alone: weight 5 · 1."""
    update_index(index, "delete", ids=["d7"])
    new = csr_array(np.array([[0] * 11 + [5]], dtype=np.float32))
    update_index(index, "add", vectors=write_documents(tmp_path / "new", new, ["d7"]))
    query = csr_array(np.array([[0] * 11 + [1]], dtype=np.float32))
    for action in ("add", "compact"):
        changed = Index.load(index) if action == "add" else update_index(index, "compact")
        assert hits(changed, query, 1) == [[("d7", 5.0)]]
        assert [doc_id for doc_id, _ in hits(changed, QUERIES, 30)[0]].count("d7") <= 1
        assert changed.manifest.counts["documents"] == 20 and changed.problems() == []
    assert set(changed.manifest.inputs) == {"collection", "vectors", "vectors_2", "model"}


def test_vectors_of_which_nothing_is_left_are_needed_no_more(index: Path, more: Path) -> None:
    update_index(index, "add", vectors=more)
    update_index(index, "delete", ids=names(0, 20))
    compacted = update_index(index, "compact")
    assert set(compacted.manifest.inputs) == {"collection", "vectors", "model"}
    assert compacted.locate("vectors") == more
    assert compacted.ids.to_pylist() == names(20, 30)


def test_unchanged_files_are_linked_and_two_generations_kept(index: Path, more: Path) -> None:
    update_index(index, "add", vectors=more)
    first, second = index / "gen-000001", index / "gen-000002"
    assert (second / "segment-000001/weights.npy").stat().st_ino == (first / "weights.npy").stat().st_ino
    update_index(index, "delete", ids=["d1"])
    assert sorted(path.name for path in index.glob("gen-*")) == ["gen-000002", "gen-000003"]
    third = index / "gen-000003"
    assert (third / "segment-000002/weights.npy").stat().st_ino == (second / "segment-000002/weights.npy").stat().st_ino
    details = Index.load(index).manifest.details
    assert details["updated_from"]["generation"] == "gen-000002"
    assert check(index) == [] and not (index / "update.json").exists()


def test_one_that_has_an_old_generation_open_reads_on(index: Path, more: Path) -> None:
    old = Index.load(index)
    before = hits(Index.load(index), QUERIES, 20)
    update_index(index, "add", vectors=more)
    update_index(index, "delete", ids=names(0, 10))
    update_index(index, "delete", ids=["d11"])
    assert not old.path.exists()
    assert hits(old, QUERIES, 20) == before
    assert hits(Index.load(index), QUERIES, 20) != before


def test_all_documents_deleted(index: Path) -> None:
    empty = update_index(index, "delete", ids=names(0, 20))
    assert hits(empty, QUERIES, 3) == [[]] * 5 and empty.problems() == []
    with pytest.raises(UsageError, match="allowed is an array of 20 booleans"):
        empty.search(QUERIES, 3, np.ones(19, dtype=bool))
    with pytest.raises(InputError, match="no document is left"):
        update_index(index, "compact")
    assert Index.load(index).manifest.counts["deleted"] == 20


def test_what_cannot_be_changes_nothing(index: Path, more: Path, tmp_path: Path) -> None:
    before = state(index)
    again = write_documents(tmp_path / "again", sparse_documents(3), ["new", "d4", "d9"])
    other = write_documents(tmp_path / "other", sparse_documents(2), ["x", "y"], model=InputRef("a" * 64, name="other"))
    narrow = write_documents(tmp_path / "narrow", sparse_documents(2, terms=5), ["x", "y"])
    cosine = write_documents(tmp_path / "cosine", sparse_documents(2), ["x", "y"], "cosine")
    dense = write_documents(tmp_path / "dense", np.ones((1, 3), dtype=np.float32), ["x"])
    for error, message, arguments in (
        (InputError, r"2 of 3 ids are not in it: 'nowhere', 'no'", ("delete", {"ids": ["nowhere", "d1", "no"]})),
        (InputError, r"2 of 3 new documents are in it already: 'd4', 'd9'", ("add", {"vectors": again})),
        (ArtifactError, r"made by another model \(fingerprint a{12}\)", ("add", {"vectors": other})),
        (ArtifactError, r"narrow: has 5 dimensions, .*index 12", ("add", {"vectors": narrow})),
        (ArtifactError, r"by cosine, the index by inner_product", ("add", {"vectors": cosine})),
        (UsageError, "gives dense vectors, a sparse-exact index takes sparse", ("add", {"vectors": dense})),
        (UsageError, "give --vectors V", ("add", {})),
        (UsageError, "nothing to delete", ("delete", {})),
        (UsageError, "add does not take --ids", ("add", {"vectors": more, "ids": ["d1"]})),
        (UsageError, "compact does not take --vectors", ("compact", {"vectors": more})),
        (UsageError, r"unknown action 'deleet' \(did you mean 'delete'", ("deleet", {})),
    ):
        action, given = arguments
        with pytest.raises(error, match=message):
            update_index(index, action, **given)  # type: ignore[arg-type]
        assert state(index) == before
    with pytest.raises(ArtifactError, match="not an index that can be updated"):
        update_index(tmp_path / "vectors", "compact")
    assert not (tmp_path / "vectors" / ".update.lock").exists()


@pytest.mark.parametrize("load", [Index.load, Index.without_engine])
def test_a_load_during_an_update_is_of_one_generation(
    load: Callable[[Path], Index], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update publishes right before the manifest is read."""
    plain, updates = Artifact.load.__func__, iter([["d1"]])  # type: ignore[attr-defined]

    def load_after_an_update(cls: type[Artifact], path: Path, **how: Any) -> Artifact:
        for ids in updates:
            update_index(index, "delete", ids=ids)
        found: Artifact = plain(cls, path, **how)
        return found

    update_index(index, "delete", ids=["d0"])
    monkeypatch.setattr(Artifact, "load", classmethod(load_after_an_update))
    loaded = load(index)
    assert loaded.path.name == "gen-000003" and loaded.manifest.counts["deleted"] == 2
    assert loaded.live is not None and np.flatnonzero(~loaded.live).tolist() == [0, 1]


def test_a_failed_build_leaves_the_index_alone(index: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval_kd.indexes.sparse_exact import SparseExactIndex

    before = state(index)
    monkeypatch.setattr(SparseExactIndex, "build", lambda *_: (_ for _ in ()).throw(RetrievalKDError("no luck")))
    with pytest.raises(RetrievalKDError, match="no luck"):
        update_index(index, "add", vectors=more)
    assert state(index) == before


def test_a_second_update_at_once_is_refused(index: Path) -> None:
    with FileLock(index / ".update.lock"), pytest.raises(RetrievalKDError, match="another process is updating it"):
        update_index(index, "delete", ids=["d1"])


def test_an_index_is_not_replaced_while_it_is_updated(index: Path, tmp_path: Path) -> None:
    with FileLock(index / ".update.lock"), pytest.raises(RetrievalKDError, match="another process is updating it"):
        build_index("sparse-exact", vectors=tmp_path / "vectors", out=index, overrides=["shards=2"], force=True)
    again = build_index("sparse-exact", vectors=tmp_path / "vectors", out=index, overrides=["shards=2"], force=True)
    assert isinstance(again, Segments) and check(index) == []


def test_vectors_that_are_gone_are_named(index: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "vectors", tmp_path / "elsewhere")
    assert update_index(index, "delete", ids=["d1"]).manifest.counts["documents"] == 19
    with pytest.raises(ArtifactError, match=r"those that were at .*/vectors are gone or others; put them back"):
        update_index(index, "compact")


def test_a_copy_where_links_cannot_be(index: Path, more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    linked = update_index(index, "delete", ids=["d1"])
    monkeypatch.setattr(os, "link", refuse)
    copied = update_index(index, "add", vectors=more)
    assert copied.manifest.counts["documents"] == 29 and check(index) == []
    assert (linked.path / "segment-000001/weights.npy").stat().st_nlink == 1  # the first generation is gone
    assert linked.fingerprint != copied.fingerprint


def test_a_deletion_links_all_that_it_does_not_change(index: Path, more: Path) -> None:
    """With ids and order: a hundred million are not sorted again to delete one."""
    update_index(index, "add", vectors=more)
    update_index(index, "delete", ids=["d1"])
    before = {name: inode for name, inode in state(index / "gen-000002").items() if name != "manifest.json"}
    after = state(index / "gen-000003")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"manifest.json", "deleted.npy"}


def test_more_shards_than_documents_are_left(tmp_path: Path) -> None:
    vectors = write_documents(tmp_path / "vectors", sparse_documents(5), names(0, 5))
    build_index("sparse-exact", vectors=vectors, shards=3, out=tmp_path / "index")
    update_index(tmp_path / "index", "delete", ids=["d0", "d1", "d3"])
    compacted = update_index(tmp_path / "index", "compact")
    assert compacted.manifest.details["segments"] == ["segment-000001", "segment-000002"]
    assert compacted.ids.to_pylist() == ["d2", "d4"] and check(tmp_path / "index") == []


def test_a_generation_that_somebody_went_back_from_is_written_over(index: Path) -> None:
    update_index(index, "delete", ids=["d1"])
    (index / "CURRENT").write_text("gen-000001\n")
    again = update_index(index, "delete", ids=["d2"])
    assert again.path.name == "gen-000002" and again.manifest.counts["deleted"] == 1
    assert "d2" not in {doc_id for line in hits(again, QUERIES, 20) for doc_id, _ in line}


def test_an_input_of_several_that_is_lost(index: Path, more: Path) -> None:
    update_index(index, "add", vectors=more)
    shutil.move(more, more.with_name("moved"))
    assert [text.partition(" is not at ")[2] for text in lost_inputs(index) if "vectors_2" in text] == [
        f"{more} any more; put it back there"
    ]


def test_the_collection_given_is_where_it_is_now(tmp_path: Path) -> None:
    """The vectors know it at a place that it was moved from."""
    build_index(
        "sparse-exact",
        vectors=write_documents(tmp_path / "vectors", sparse_documents(2), ["a", "b"]),
        out=tmp_path / "index",
    )
    collection = make_tiny_collection(tmp_path)
    more = write_documents(tmp_path / "more", sparse_documents(2), ["d00", "d01"], collection=collection.ref())
    moved = tmp_path / "moved"
    shutil.move(collection.path, moved)
    changed = update_index(tmp_path / "index", "add", vectors=more, collection=moved)
    assert changed.locate("collection_2") == moved


def test_the_same_index_is_not_built_over_an_update(index: Path, tmp_path: Path) -> None:
    update_index(index, "delete", ids=["d1"])
    with pytest.raises(OutputExistsError, match="was updated since it was built"):
        build_index("sparse-exact", vectors=tmp_path / "vectors", out=index)
    anew = build_index("sparse-exact", vectors=tmp_path / "vectors", out=index, force=True)
    assert anew.manifest.counts["documents"] == 20
    assert [path.name for path in index.glob("gen-*")] == ["gen-000001"]


def test_damage_inside_a_segment_is_found(index: Path, more: Path) -> None:
    changed = update_index(index, "add", vectors=more)
    manifest = changed.path / "segment-000002" / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b"sparse-exact", b"sparse_exact"))
    assert any("segment-000002/manifest.json differs from its checksum" in problem for problem in check(index))
    manifest.write_bytes(whole)
    os.truncate(changed.path / "segment-000002" / "weights.npy", 40)
    assert "segment-000002/weights.npy has 40 bytes" in check(index)[0]
    with pytest.raises(ArtifactError, match=r"weights\.npy has 40 bytes, \d+ were written"):
        Index.load(index)


def test_an_index_of_a_newer_format(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_kd.artifact.FORMATS", {"index": 0})
    with pytest.raises(ArtifactError, match=r"index format \d+ is newer than this version reads"):
        update_index(index, "delete", ids=["d1"])


class TestText:
    """BM25's weights depend on all documents: bm25s keeps them, Lucene works them out when it is asked."""

    QUERIES = ("cat", "fish bird", "dog cat cat")
    TEXTS = ("cat", "cat dog", "bird", "cat fish", "fish", "dog dog bird")

    @pytest.fixture(params=["bm25", "lucene"])
    def kind(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def text_index(self, kind: str, collect: Callable[..., Collection], tmp_path: Path) -> Path:
        build_index(kind, collection=collect(self.TEXTS[:3]), out=tmp_path / "text")
        return tmp_path / "text"

    @pytest.fixture
    def later(self, collect: Callable[..., Collection]) -> Collection:
        return collect(self.TEXTS[3:], "later", start=3)

    def fresh(self, kind: str, collect: Callable[..., Collection], rows: Sequence[int]) -> list[Any]:
        """The hits of an index of these documents alone that is built in one piece."""
        given = collect([self.TEXTS[row] for row in rows], "fresh")
        index = build_index(kind, collection=given, out=given.path.with_name("fresh-index"))
        renamed = {f"d{i}": f"d{row}" for i, row in enumerate(rows)}
        return [[(renamed[doc_id], score) for doc_id, score in line] for line in hits(index, self.QUERIES, 6)]

    @pytest.mark.parametrize("rebuild", [False, True])
    def test_it_grows_as_if_built_at_once(
        self, rebuild: bool, kind: str, text_index: Path, later: Collection, collect: Callable[..., Collection]
    ) -> None:
        if kind == "bm25" and not rebuild:
            with pytest.raises(
                UsageError, match=r"cannot grow, .* add --rebuild to build it anew from the old collections"
            ):
                update_index(text_index, "add", collection=later)
            return
        grown = update_index(text_index, "add", collection=later, rebuild=rebuild)
        assert isinstance(grown, Segments) != rebuild
        assert hits(grown, self.QUERIES, 6) == self.fresh(kind, collect, range(6))
        assert list(grown.manifest.inputs) == ["collection", "collection_2"]
        assert grown.path.name == "gen-000002" and check(text_index) == []

    def test_compacted_as_if_the_deleted_had_never_been(
        self, kind: str, text_index: Path, later: Collection, collect: Callable[..., Collection]
    ) -> None:
        before = hits(update_index(text_index, "add", collection=later, rebuild=True), self.QUERIES, 6)
        deleted = hits(update_index(text_index, "delete", ids=["d1", "d4"]), self.QUERIES, 6)
        assert deleted == [[hit for hit in line if hit[0] not in ("d1", "d4")] for line in before]
        compacted = hits(update_index(text_index, "compact"), self.QUERIES, 6)
        assert compacted == self.fresh(kind, collect, [0, 2, 3, 5]) != deleted

    def test_what_it_refuses(self, kind: str, text_index: Path, later: Collection, embed: Callable[..., Any]) -> None:
        with pytest.raises(UsageError, match="reads text: give the new documents with --collection C"):
            update_index(text_index, "add")
        with pytest.raises(UsageError, match="reads text: give the new documents with --collection C"):
            update_index(text_index, "add", vectors=embed(np.eye(2, dtype=np.float32)), rebuild=True)
        with pytest.raises(InputError, match="3 of 3 new documents are in it already: 'd0', 'd1', 'd2'"):
            update_index(text_index, "add", collection=text_index.with_name("collection"), rebuild=True)
        shutil.rmtree(text_index.with_name("collection"))
        with pytest.raises(ArtifactError, match=r"only from all its collections, and those that were at .* are gone"):
            update_index(text_index, "add", collection=later, rebuild=True)

    def test_a_rebuild_into_shards_answers_the_same(
        self, kind: str, later: Collection, collect: Callable[..., Collection], tmp_path: Path
    ) -> None:
        build_index(kind, collection=collect(self.TEXTS[:3]), out=tmp_path / "text", shards=2)
        grown = update_index(tmp_path / "text", "add", collection=later, rebuild=True)
        assert isinstance(grown, Segments) and check(tmp_path / "text") == []
        assert hits(grown, self.QUERIES, 6) == self.fresh(kind, collect, range(6))


def test_rebuilt_with_what_is_added(index: Path, more: Path, tmp_path: Path) -> None:
    update_index(index, "delete", ids=["d0", "d5"])
    rebuilt = update_index(index, "add", vectors=more, rebuild=True)
    assert not isinstance(rebuilt, Segments)
    assert rebuilt.ids.to_pylist() == [doc_id for doc_id in names(0, 30) if doc_id not in ("d0", "d5")]
    both = np.concatenate([sparse_documents(20).toarray(), sparse_documents(10, seed=4).toarray()])
    live = csr_array(np.delete(both, [0, 5], axis=0))
    assert hits(rebuilt, QUERIES, 28) == best(all_scores(QUERIES, live, "dot"), rebuilt.ids.to_pylist(), 28)


def test_the_record_says_what_was_under_way(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is there before the first file of the new generation is."""
    from retrieval_kd.indexes import update

    seen: list[dict[str, Any]] = []
    link = update.link_segments

    def spy(*arguments: Any) -> Any:
        seen.append(json.loads((index / "update.json").read_text()))
        return link(*arguments)

    monkeypatch.setattr(update, "link_segments", spy)
    update_index(index, "delete", ids=["d1"])
    assert [(record["action"], record["from"], record["to"]) for record in seen] == [
        ("delete", "gen-000001", "gen-000002")
    ]
