from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from retrieval_kd.errors import ArtifactError, InputError
from retrieval_kd.models.load import SETTINGS, Model, find_model
from retrieval_kd.plan import Plan


def make_artifact(model: Path, out: Path) -> Model:
    plan = Plan("model", {"kind": "dense"}, {})
    with plan.write(out) as draft:
        shutil.copytree(model, draft.path, dirs_exist_ok=True)
        (draft.path / SETTINGS).write_text('{"kind": "dense", "similarity": "cosine"}')
    return Model.load(out)


def test_builtin_is_named_not_placed() -> None:
    source = find_model("builtin")
    assert (source.path / "modules.json").is_file()
    assert (source.ref().name, source.ref().path) == ("builtin", None)


def test_directory_is_placed(dense: Path) -> None:
    source = find_model(dense)
    assert (source.path, source.artifact, source.revision) == (dense, False, None)
    assert (source.ref().name, source.ref().path) == (None, dense)


def test_fingerprint_changes_with_one_byte(dense: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dense, tmp_path / "copy")
    assert find_model(copy).fingerprint == find_model(dense).fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_model(copy).fingerprint != find_model(dense).fingerprint


def test_model_artifact_has_the_artifacts_fingerprint(dense: Path, tmp_path: Path) -> None:
    artifact = make_artifact(dense, tmp_path / "model")
    source = find_model(tmp_path / "model")
    assert source.artifact and source.fingerprint == artifact.fingerprint
    assert source.ref().path == tmp_path / "model"
    assert artifact.settings == {"kind": "dense", "similarity": "cosine"}
    assert artifact.problems() == []
    (artifact.path / "config.json").unlink(missing_ok=True)
    assert artifact.problems() == []
    (artifact.path / "modules.json").unlink()
    assert artifact.problems() == ["neither config.json nor modules.json is there"]


def test_damaged_artifact_is_refused(dense: Path, tmp_path: Path) -> None:
    make_artifact(dense, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json has 2 bytes"):
        find_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c"])
def test_missing_path(name: str) -> None:
    with pytest.raises(InputError, match="no such model"):
        find_model(name)


def test_hub_name_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'nobody/nothing'.*HF_HUB_OFFLINE.*builtin"):
        find_model("nobody/nothing")


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither modules\.json nor config\.json"):
        find_model(tmp_path)


def test_plain_transformer_is_a_model(tmp_path: Path) -> None:
    assert find_model(tiny.make_transformer(tmp_path / "plain")).path == tmp_path / "plain"
