"""A cross-encoder as teacher: query and document read together, its raw logit kept as float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from retrieval_kd.artifact import InputRef
from retrieval_kd.atomic import write_atomically
from retrieval_kd.errors import InputError, RetrievalKDError
from retrieval_kd.models.batching import token_batches
from retrieval_kd.models.cross_encoder import load_cross_encoder, pair_limit, query_prompt, scores_only
from retrieval_kd.models.load import find_model
from retrieval_kd.models.onednn import use_onednn
from retrieval_kd.models.onnx import OnnxSession, deviation, export_onnx, quantize_int8, require_onnx
from retrieval_kd.teachers.base import Candidates, ModelTeacherRecipe, Scored, ScoringJob, Teacher

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = {"cpu": 1024, "gpu": 32768}
"""Padded tokens of a batch: on a CPU what stays in the caches, on a GPU what keeps it busy in little memory."""
COMPARED = 64
"""Pairs on which an exported model is compared with the torch model."""
EXPORT_TOLERANCE = 0.01
"""The largest difference of a float32 export's logit from torch's; rounding gives about 1e-5, a wrong graph more."""

Forward = Callable[[Mapping[str, "Tensor"]], np.ndarray]
"""Padded features of a batch → its raw scores [B, 1]."""


class CrossEncoderTeacher(Teacher):
    """Scores by the one logit of a sentence-transformers ``CrossEncoder``, without its sigmoid."""

    class Recipe(ModelTeacherRecipe):
        """Keys of ``kind: cross-encoder``."""

        kind: Literal["cross-encoder"]
        max_length: int | None = Field(default=None, ge=8)
        batch_tokens: int | None = Field(default=None, ge=1)
        """Padded tokens of a batch; `BATCH_TOKENS` when not given."""
        precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """``auto``: bfloat16 on a GPU that has it, else float32. A score is float32 in any case."""
        backend: Literal["torch", "onnx", "onnx-int8"] = "torch"
        pairs_per_shard: int = Field(default=2048, ge=1)

        @model_validator(mode="after")
        def _onnx_has_its_own_precision(self) -> CrossEncoderTeacher.Recipe:
            if self.backend != "torch" and self.precision not in ("auto", "float32"):
                raise ValueError(
                    f"precision '{self.precision}' is for backend torch; {self.backend} computes in float32"
                )
            return self

    recipe: Recipe

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.backend != "torch":
            require_onnx()
        self.source = find_model(recipe.model, recipe.revision)
        self._exported: Path | None = None

    @property
    def score_kind(self) -> str:
        """``logit``."""
        return "logit"

    def ref(self) -> InputRef:
        """The model's reference."""
        return self.source.ref()

    def details(self) -> dict[str, Any]:
        """Model, revision, length, precision and prompt; of an exported model also how far it is from torch."""
        facts: dict[str, Any] = {
            "model": self.source.name,
            "revision": self.source.revision,
            "max_length": self._limit,
            "dtype": self._dtype,
            "backend": self.recipe.backend,
            "prompt": query_prompt(self._model) or None,
        }
        if self._exported is not None:
            facts["deviation_from_torch"] = json.loads((self._exported / "deviation.json").read_text())
        return facts

    def prepare(self, job: ScoringJob) -> None:
        """Exports the model for an ONNX backend; whatever was prepared before is used again."""
        if self.recipe.backend == "torch":
            self._keep_precision(job.work / "precision")
            return
        folder = job.work / "onnx"
        if not folder.is_dir():
            self._export(folder, job)
        self._exported = folder

    def score(self, shard: Sequence[Candidates], texts: Sequence[Sequence[str]]) -> Scored:
        """Raw logits; pairs of similar length share a batch."""
        queries = [candidates.text for candidates, documents in zip(shard, texts, strict=True) for _ in documents]
        documents = [text for of_query in texts for text in of_query]
        logits, lost = self._logits(self._forward, queries, documents)
        bounds = np.cumsum([len(of_query) for of_query in texts])[:-1]
        return Scored(np.split(logits, bounds), np.split(lost, bounds))

    @cached_property
    def _dtype(self) -> str:
        """What the weights are computed in: ``float32``, ``bfloat16``, ``float16`` or ``int8``."""
        import torch

        if self.recipe.backend == "onnx-int8":
            return "int8"
        if self.recipe.precision != "auto":
            return self.recipe.precision
        on_gpu = self.recipe.backend == "torch" and torch.cuda.is_available()
        return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

    @cached_property
    def _model(self) -> Any:
        """The `CrossEncoder`, checked; on the CPU for an ONNX backend."""
        return load_cross_encoder(
            self.source,
            max_length=self.recipe.max_length,
            device=None if self.recipe.backend == "torch" else "cpu",
            dtype="float32" if self._dtype == "int8" else self._dtype,
            own_networks=self.recipe.backend == "torch",
        )

    @cached_property
    def _limit(self) -> int | None:
        return pair_limit(self._model)

    @cached_property
    def _forward(self) -> Forward:
        """The network that scores: torch's, or the exported one (the torch weights are then let go)."""
        if self.recipe.backend == "torch":
            if self._dtype == "float32" and self._model.device.type == "cpu":
                use_onednn(self._model)
            return self._torch_forward
        if self._exported is None:
            raise RetrievalKDError(f"backend {self.recipe.backend}: the model is exported by prepare()")
        session = OnnxSession(self._exported / "model.onnx")
        self._model.to("meta")
        return session

    def _torch_forward(self, features: Mapping[str, Tensor]) -> np.ndarray:
        import torch

        model = self._model
        try:
            with torch.inference_mode():
                scores = model({name: tensor.to(model.device) for name, tensor in features.items()})["scores"]
                return np.asarray(scores.float().cpu().numpy())
        except torch.OutOfMemoryError as error:
            raise RetrievalKDError(
                f"a batch of {features['input_ids'].numel()} tokens does not fit into the GPU's memory; "
                f"set batch_tokens lower (it is {self._budget})"
            ) from error

    @property
    def _budget(self) -> int:
        return self.recipe.batch_tokens or BATCH_TOKENS["cpu" if self._model.device.type in ("cpu", "meta") else "gpu"]

    def _logits(
        self, forward: Forward, queries: Sequence[str], documents: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw logits float32 [n] of pairs, and the tokens int32 [n] that were cut off each."""
        prompt = query_prompt(self._model)
        queries = [prompt + query for query in queries]
        if cut_apart := getattr(self._model[0], "tokenize_pairs", None):  # a network of this package
            pairs, lost = cut_apart(queries, documents)
        else:
            pairs, lost = _tokenize(self._model.tokenizer, queries, documents, self._limit)
        logits = np.empty(len(pairs), dtype=np.float32)
        for batch in token_batches([len(pair["input_ids"]) for pair in pairs], self._budget):
            padded = self._model.tokenizer.pad([pairs[i] for i in batch], return_tensors="pt")
            logits[batch] = forward(padded)[:, 0]
        return logits, lost

    def _keep_precision(self, file: Path) -> None:
        """`InputError` when ``auto`` means something else on this machine than where the score file was begun."""
        if file.is_file() and (before := file.read_text()) != self._dtype:
            raise InputError(
                f"{file.parent}: these scores were begun in {before}, but precision 'auto' is {self._dtype} on this "
                f"machine; go on where they were begun, or start over with precision={self._dtype}"
            )
        write_atomically(file, self._dtype.encode())

    def _export(self, folder: Path, job: ScoringJob) -> None:
        """Writes ``folder`` whole or not at all: ``model.onnx`` and ``deviation.json``, from pairs of the job."""
        queries, documents = _some_pairs(job, COMPARED)
        by_torch, _ = self._logits(self._torch_forward, queries, documents)
        draft = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        example = self._model.tokenizer(["a", "a b"], ["c", "d"], padding=True, return_tensors="pt")
        if self.recipe.backend == "onnx":
            export_onnx(scores_only(self._model), example, draft / "model.onnx", output="scores")
        else:
            whole = draft / "float32"
            whole.mkdir()
            export_onnx(scores_only(self._model), example, whole / "model.onnx", output="scores")
            quantize_int8(whole / "model.onnx", draft / "model.onnx")
            shutil.rmtree(whole)
        by_onnx, _ = self._logits(OnnxSession(draft / "model.onnx"), queries, documents)
        finite = np.isfinite(by_torch)  # a pair that torch cannot score either says nothing about the export
        if not finite.any():
            raise RetrievalKDError(
                f"model '{self.source.name}' gives NaN or infinite scores for all of {len(finite)} pairs"
            )
        found = deviation(by_onnx[finite], by_torch[finite])
        if self.recipe.backend == "onnx" and not found.max <= EXPORT_TOLERANCE:
            raise RetrievalKDError(
                f"model '{self.source.name}': its ONNX export is off by {found.max:.3g} from torch on "
                f"{found.pairs} pairs; use backend=torch"
            )
        write_atomically(draft / "deviation.json", json.dumps(found._asdict()).encode())
        draft.rename(folder)


def _tokenize(
    tokenizer: Any, queries: Sequence[str], documents: Sequence[str], limit: int | None
) -> tuple[list[dict[str, list[int]]], np.ndarray]:
    """The features of each pair, cut as the tokenizer cuts pairs (the longer text first), and the tokens lost.

    Only pairs that are too long are tokenised twice.
    """

    def features(which: Sequence[int], **truncation: Any) -> list[dict[str, list[int]]]:
        columns = tokenizer([queries[i] for i in which], [documents[i] for i in which], verbose=False, **truncation)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    pairs = features(range(len(queries)), truncation=False)
    lost = np.zeros(len(pairs), dtype=np.int32)
    long = [i for i, pair in enumerate(pairs) if limit is not None and len(pair["input_ids"]) > limit]
    if long:
        for i, cut in zip(long, features(long, truncation="longest_first", max_length=limit), strict=True):
            lost[i] = len(pairs[i]["input_ids"]) - len(cut["input_ids"])
            pairs[i] = cut
    return pairs, lost


def _some_pairs(job: ScoringJob, n: int) -> tuple[list[str], list[str]]:
    """Up to ``n`` (query, document) pairs, evenly spread over the candidates."""
    ends = np.cumsum([len(query.rows) for query in job.candidates])
    chosen = np.unique(np.linspace(0, ends[-1] - 1, n).astype(np.int64))
    owners = np.searchsorted(ends, chosen, side="right")
    rows = [job.candidates[i].rows[position - ends[i]] for i, position in zip(owners, chosen, strict=True)]
    return [job.candidates[i].text for i in owners], job.collection.documents.texts(np.asarray(rows))
