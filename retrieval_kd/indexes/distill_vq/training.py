"""The gradient part of Distill-VQ: codebooks as a torch module, its losses, and one epoch of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval_kd.indexes.distill_vq.codebooks import Codebooks
from retrieval_kd.indexes.distill_vq.recipe import Training
from retrieval_kd.indexes.distill_vq.teaching import Documents, Lesson
from retrieval_kd.losses import on_scores


class LearnedCodebooks(nn.Module):
    """`Codebooks` that learn. The rotation is a Cayley transform times the first one, so that it stays orthogonal."""

    def __init__(self, book: Codebooks, dimension: int, keys: Training) -> None:
        super().__init__()
        self.start = book
        self.straight_through = keys.selection == "straight-through"
        self.words = nn.Parameter(torch.from_numpy(book.words.copy()))
        self.centroids = None if book.centroids is None else nn.Parameter(torch.from_numpy(book.centroids.copy()))
        rotation = None if book.rotation is None else torch.from_numpy(book.rotation.copy())
        self.first_rotation: Tensor | None
        self.register_buffer("first_rotation", rotation, persistent=False)
        self.turn = None
        if rotation is not None and keys.rotation_learning_rate > 0:
            self.turn = nn.Parameter(torch.zeros(len(rotation), len(rotation)))
        by_rotation = 0.0 if rotation is None else 2e-3
        self.query_rate = by_rotation if keys.query_learning_rate == "auto" else keys.query_learning_rate
        self.query_change = nn.Parameter(torch.zeros(dimension, dimension)) if self.query_rate > 0 else None

    def groups(self, keys: Training) -> list[dict[str, Any]]:
        """The parameters that learn, with their learning rates."""
        rates = (
            (self.words, keys.learning_rate),
            (self.centroids, keys.centroid_learning_rate),
            (self.turn, keys.rotation_learning_rate),
            (self.query_change, self.query_rate),
        )
        return [{"params": [value], "lr": rate, "rate": rate} for value, rate in rates if value is not None]

    def rotation(self) -> Tensor | None:
        """[h, d], with orthogonal rows when it began so."""
        if self.turn is None:
            return self.first_rotation
        skew = self.turn - self.turn.T
        identity = torch.eye(len(skew), device=skew.device)
        return torch.linalg.solve(identity + skew, identity - skew) @ self.first_rotation

    def queries(self, queries: Tensor, rotation: Tensor | None) -> Tensor:
        """Queries [B, d] in the space of the codebooks [B, h]."""
        if self.query_change is not None:
            queries = queries + queries @ self.query_change.T
        return queries if rotation is None else queries @ rotation.T

    def forward(self, rotated: Tensor, lists: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What codes and centroids say of the documents [n, h], and their centroids [n, h] (None without lists).

        ``codes`` [n, M] are None where they are chosen here: straight through, of a product.
        """
        centroid = None if self.centroids is None else functional.embedding(lists, self.centroids)
        base = centroid if centroid is not None and self.start.residual else torch.zeros_like(rotated)
        if not len(self.words):
            return base, centroid
        if self.straight_through:
            return base + self._straight_through(rotated - base, codes), centroid
        assert codes is not None
        if self.start.product:
            return base + self._chosen(codes).flatten(1), centroid
        return base + functional.embedding_bag(*self._as_embedding(codes), mode="sum"), centroid

    def _straight_through(self, left: Tensor, codes: Tensor | None) -> Tensor:
        """The codewords [n, h], with the gradient of the chosen ones and of a softmax over ``-distance²``.

        Of a product the nearest are chosen. Where codewords are added the ``codes`` of the epoch stay, and distances
        are to what the other codebooks leave.
        """
        if self.start.product:
            pieces = left.view(len(left), len(self.words), -1)
        else:
            assert codes is not None
            pieces = self._chosen(codes)
            pieces = left.unsqueeze(1) - pieces.sum(dim=1, keepdim=True) + pieces
        distances = self.words.square().sum(-1) - 2 * torch.einsum("nmd,mkd->nmk", pieces, self.words)
        chosen = self._chosen(distances.argmin(dim=2) if codes is None or self.start.product else codes)
        soft = torch.softmax(-distances, dim=2)
        chosen = chosen + torch.einsum("nmk,mkd->nmd", soft - soft.detach(), self.words.detach())
        return chosen.flatten(1) if self.start.product else chosen.sum(dim=1)

    def _chosen(self, codes: Tensor) -> Tensor:
        """The codewords [n, M, w] of codes [n, M]."""
        return functional.embedding(*self._as_embedding(codes))

    def _as_embedding(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and codewords of all codebooks as one table, whose gradient is added up in a fixed order."""
        parts, number, width = self.words.shape
        first = number * torch.arange(parts, device=codes.device)
        return codes + first, self.words.reshape(parts * number, width)

    def book(self) -> Codebooks:
        """The codebooks as they are now."""

        def array(value: Tensor | None) -> np.ndarray | None:
            return None if value is None else value.detach().cpu().numpy().copy()

        rotation = self.rotation()
        query_map = None
        if self.query_change is not None:
            query_map = self.queries(torch.eye(len(self.query_change), device=self.words.device), rotation).T
        words = array(self.words)
        assert words is not None
        return replace(
            self.start,
            words=words,
            centroids=array(self.centroids),
            rotation=array(rotation),
            query_map=array(query_map),
        )


def relevance_loss(student: Tensor, teacher: Tensor, mask: Tensor, keys: Training, temperature: float) -> Tensor:
    """The recipe's loss of scores [B, n] against a teacher's of that temperature."""
    if keys.loss in ("listnet", "kl", "reverse-kl"):
        functions: dict[str, Callable[..., Tensor]] = {
            "listnet": on_scores.list_net,
            "kl": on_scores.kl_divergence,
            "reverse-kl": on_scores.reverse_kl,
        }
        both = {"student_temperature": keys.temperature, "teacher_temperature": temperature}
        # the losses grow with the square of the temperature, which would count against a second loss
        return functions[keys.loss](student, teacher, mask, **both) / keys.temperature**2
    student, teacher = student / keys.temperature, teacher / temperature
    if keys.loss == "margin-mse":
        return on_scores.margin_mse(student, teacher, mask, pairs="all")
    return (on_scores.rank_net if keys.loss == "ranknet" else on_scores.mse)(student, teacher, mask)


class Lessons:
    """The steps of epochs: batches of documents against their queries, and Adam."""

    def __init__(self, learner: LearnedCodebooks, keys: Training, documents: Documents, lists: np.ndarray) -> None:
        self.learner = learner
        self.keys = keys
        self.documents = documents
        self.lists = lists
        self.optimizer = torch.optim.Adam(learner.groups(keys))
        self.centroid_weight = None if keys.centroid_weight == "auto" else keys.centroid_weight
        # codes that are added are fitted to one another, and come apart when codewords move far from the documents
        by_kind = 0.0 if learner.start.product else 10.0
        self.reconstruction = by_kind if keys.reconstruction == "auto" else keys.reconstruction

    def epoch(self, lessons: Iterable[Lesson], codes: np.ndarray | None, done: float, step: float) -> Iterable[float]:
        """The loss of each step. ``done`` is the share of all steps before this epoch, ``step`` the share of one."""
        for lesson in lessons:
            # linear: up for a tenth of the steps, then down
            factor = min(1.0, (done + step) / 0.1, (1 - done) / 0.9)
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * max(factor, 0.0)
            loss = self._loss(lesson, codes)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            done += step
            yield float(loss.detach())

    def _loss(self, lesson: Lesson, codes: np.ndarray | None) -> Tensor:
        device = self.learner.words.device
        x = torch.from_numpy(self.documents.rows(lesson.rows)).to(device)
        asked = torch.from_numpy(lesson.queries).to(device)
        lists = torch.from_numpy(self.lists[lesson.rows].astype(np.int64)).to(device)
        of_batch = None if codes is None else torch.from_numpy(codes[lesson.rows].astype(np.int64)).to(device)
        rotation = self.learner.rotation()
        rotated = x if rotation is None else x @ rotation.T
        said, centroid = self.learner(rotated, lists, of_batch)
        queries = self.learner.queries(asked, rotation)
        loss = self._against(queries @ said.T, asked @ x.T, lesson)
        if centroid is not None and said is not centroid:
            of_centroids = self._against(queries @ centroid.T, asked @ x.T, lesson)
            if self.centroid_weight is None:
                self.centroid_weight = float(loss.detach() / (of_centroids.detach() + 1e-6))
            loss = loss + self.centroid_weight * of_centroids
        if self.reconstruction:
            loss = loss + self.reconstruction * (rotated - said).square().sum(dim=1).mean()
        return loss

    def _against(self, student: Tensor, inner_products: Tensor, lesson: Lesson) -> Tensor:
        """The loss against the vectors' own inner products, and against score files by their weight."""
        keys = self.keys
        mask = torch.from_numpy(lesson.mask).to(student.device)
        known = torch.from_numpy(lesson.known).to(student.device)
        scores = torch.from_numpy(lesson.scores).to(student.device)
        if keys.loss == "ranknet":  # pairs of a whole batch would be millions: of a query's own documents only
            columns = torch.from_numpy(lesson.drawn).to(student.device)
            student, inner_products, mask, known, scores = (
                values.gather(1, columns) for values in (student, inner_products, mask, known, scores)
            )
        weight = keys.score_weight if bool(known.any()) else 0.0
        loss = torch.zeros((), device=student.device)
        if weight < 1:
            loss = (1 - weight) * relevance_loss(student, inner_products, mask, keys, keys.temperature)
        if weight > 0:
            loss = loss + weight * relevance_loss(student, scores, known, keys, keys.score_temperature)
        return loss
