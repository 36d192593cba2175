"""The course of a training: from FAISS's own index, over epochs that are evaluated and can be resumed, to the best."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.errors import UsageError
from retrieval_kd.indexes import faiss_structure as structure
from retrieval_kd.indexes.distill_vq.codebooks import Codebooks, filled
from retrieval_kd.indexes.distill_vq.layout import Layout
from retrieval_kd.indexes.distill_vq.recipe import DistillVQRecipe
from retrieval_kd.indexes.distill_vq.teaching import Documents, Pupils, lessons, steps
from retrieval_kd.indexes.faiss_package import import_faiss
from retrieval_kd.progress import progress

log = logging.getLogger("retrieval_kd")

_DEPTH = 10
"""Hits that an evaluation compares."""


@dataclass
class Course:
    """Everything a training needs, and what has come of it so far."""

    recipe: DistillVQRecipe
    layout: Layout
    documents: Documents
    template: Any
    """The index that FAISS trained, without documents."""
    real: Pupils | None
    pseudo: Pupils | None
    held_out: Pupils
    work: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    """Its ``overlap``, ``epoch`` (None: FAISS's own index), ``lists`` and ``index`` (a file in ``work``)."""

    def run(self, start: Path) -> None:
        """Trains; then ``best`` is the best of all epochs and of ``start``, the index that FAISS built by itself."""
        import torch

        from retrieval_kd.indexes.distill_vq.training import LearnedCodebooks, Lessons

        keys = self.recipe.training
        faiss = import_faiss()
        checkpoint = self.work / "checkpoint.pt"
        book = self._refined(Codebooks.of(self.template, self.layout, residual=self.recipe.residual))
        lists = self._first_lists(book)
        learner = LearnedCodebooks(book, self.documents.matrix.shape[1], keys).to(_device(self.recipe.device))
        course = Lessons(learner, keys, self.documents, lists)
        fixed = bool(self.layout.parts) and not (self.layout.product and learner.straight_through)
        first = 0
        if checkpoint.is_file():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            learner.load_state_dict(state["learner"])
            course.optimizer.load_state_dict(state["optimizer"])
            course.centroid_weight, first = state["centroid_weight"], state["epochs"]
            self.history, self.best = state["history"], state["best"]
            log.info("going on after epoch %s of %s", first, keys.epochs)
        else:
            self.best = {"overlap": self._overlap(faiss.read_index(str(start))), "epoch": None, "lists": "reassigned"}
            self.best["index"] = start.name
            self.history = [{"epoch": None, "reassigned": self.best["overlap"]}]
            self._evaluate(book, lists, 0)
        each = steps(self.real, self.pseudo, keys)
        with progress(f"distilling {keys.epochs} epochs", keys.epochs * each, done=first * each) as advance:
            for epoch in range(first, keys.epochs):
                lessons_of_epoch = lessons(self.real, self.pseudo, keys, [self.recipe.seed, 3, epoch])
                codes = np.load(self.work / f"codes-{epoch}.npy", mmap_mode="r") if fixed else None
                losses = []
                for loss in course.epoch(lessons_of_epoch, codes, epoch / keys.epochs, 1 / keys.epochs / each):
                    losses.append(loss)
                    advance(1)
                self._evaluate(learner.book(), lists, epoch + 1, loss=float(np.mean(losses)))
                state = {
                    "learner": learner.state_dict(),
                    "optimizer": course.optimizer.state_dict(),
                    "centroid_weight": course.centroid_weight,
                    "epochs": epoch + 1,
                    "history": self.history,
                    "best": self.best,
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
                self._clear(epoch + 1)

    def _refined(self, book: Codebooks) -> Codebooks:
        rounds = self.recipe.training.refinement
        if self.layout.product or not rounds:
            return book
        drawn = min(len(self.documents), self.recipe.train_sample)
        rows = np.sort(np.random.default_rng(self.recipe.seed).choice(len(self.documents), drawn, replace=False))
        sample = book.rotated(self.documents.rows(rows))
        return book.refined(sample, book.nearest_lists(sample), rounds)

    def _first_lists(self, book: Codebooks) -> np.ndarray:
        """The list [documents] int32 of each document at the start, memory-mapped."""
        path = self.work / "lists.npy"
        found = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(len(self.documents),))
        for place, part in self.documents.batches():
            found[place] = book.nearest_lists(book.rotated(part))
        found.flush()
        return found

    def _evaluate(self, book: Codebooks, lists: np.ndarray, epoch: int, **values: float) -> None:
        """Measures the index of these codebooks with the first lists and with those that FAISS would choose now."""
        line: dict[str, Any] = {"epoch": epoch, **values}
        for variant in ("fixed", "reassigned") if self.layout.lists else ("fixed",):
            again = variant == "reassigned"
            index = filled(self.template, self.layout, book, self._coded(book, lists, epoch, again=again))
            line[variant] = self._overlap(index)
            if line[variant] > self.best["overlap"]:
                name = f"best-{epoch}.faiss"
                import_faiss().write_index(index, str(self.work / name))
                if book.query_map is not None and book.rotation is not None:
                    np.save(self.work / f"best-{epoch}.npy", book.rotation)
                self.best = {"overlap": line[variant], "epoch": epoch, "lists": variant, "index": name}
        self.history.append(line)

    def _coded(
        self, book: Codebooks, lists: np.ndarray, epoch: int, *, again: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Lists and codes of all documents; those of the first lists are kept for the next epoch."""
        shape = (len(self.documents), self.layout.parts)
        kept = former = None
        if self.layout.parts and not again:
            path = self.work / f"codes-{epoch}.npy"
            kept = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            if epoch and not self.layout.product:
                former = np.load(self.work / f"codes-{epoch - 1}.npy", mmap_mode="r")
        for place, part in self.documents.batches():
            rotated = book.rotated(part)
            of_part = book.nearest_lists(rotated) if again else lists[place].astype(np.int64)
            if not self.layout.parts:
                yield of_part, rotated
                continue
            codes = book.encode(rotated, of_part, None if former is None else np.asarray(former[place]))
            if kept is not None:
                kept[place] = codes
            yield of_part, codes

    def _overlap(self, index: Any) -> float:
        """The share of the teachers' best ten that the index finds for the held-out queries."""
        structure.set_parameters(index, self.recipe.factory, self.recipe.search.of_faiss())
        pupils = self.held_out
        _, found = index.search(pupils.vectors, min(_DEPTH + 1, len(self.documents)))
        dense, scored = [], []
        for place, rows in enumerate(found):
            hits = rows[(rows >= 0) & (rows != pupils.own[place])][:_DEPTH]
            dense.append(_share(hits, pupils.top[place][:_DEPTH]))
            of_scores = pupils.best_scored(place, _DEPTH)
            if len(of_scores):
                scored.append(_share(hits, of_scores))
        weight = self.recipe.training.score_weight if scored else 0.0
        return float((1 - weight) * np.mean(dense) + (weight * np.mean(scored) if scored else 0.0))

    def _clear(self, epoch: int) -> None:
        """Deletes what the checkpoint of this epoch does not need."""
        kept = {f"codes-{epoch}.npy", self.best["index"], Path(self.best["index"]).with_suffix(".npy").name}
        for pattern in ("codes-*.npy", "best-*"):
            for path in self.work.glob(pattern):
                if path.name not in kept:
                    path.unlink()


def _share(hits: np.ndarray, wanted: Sequence[int] | np.ndarray) -> float:
    return len(np.intersect1d(hits, wanted)) / len(wanted)


def _device(name: str) -> str:
    """The device that trains for ``name``: one GPU for ``all`` too; the CPU, and it is said, where there is none."""
    import torch

    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or not number:
        if name not in ("auto", "cpu"):
            log.warning("device %s: torch sees no GPU and trains on the CPU", name)
        return "cpu"
    if name.startswith("cuda:") and int(name.removeprefix("cuda:")) >= number:
        raise UsageError(f"device {name}: torch sees {number} GPUs, cuda:0 to cuda:{number - 1}")
    return name if name.startswith("cuda:") else "cuda:0"
