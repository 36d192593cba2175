"""The verb ``eval``: indexes and runs on one split → measures, tests, costs and a report."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from retrieval_kd.artifact import InputRef, Manifest, is_artifact, resolve
from retrieval_kd.errors import ArtifactError, DataError, InputError, RecipeError, UsageError, did_you_mean, first
from retrieval_kd.eval.report import Report, write_report
from retrieval_kd.eval.schema import EvaluationRecipe
from retrieval_kd.indexes.base import input_names
from retrieval_kd.measures import about, evaluate_run
from retrieval_kd.plan import Plan
from retrieval_kd.progress import progress
from retrieval_kd.recipe import Recipe, load_recipe
from retrieval_kd.registry import implementation
from retrieval_kd.software import software_versions

if TYPE_CHECKING:
    from retrieval_kd.data.collection import Collection
    from retrieval_kd.data.run import Run
    from retrieval_kd.eval.efficiency import Efficiency
    from retrieval_kd.eval.significance import Floats

log = logging.getLogger("retrieval_kd")

_BATCH = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Systems:
    """What is evaluated: name → path of an index, name → path of a run, and name → a line for the report."""

    indexes: Mapping[str, str | Path]
    runs: Mapping[str, str | Path]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all systems, the indexes' first."""
        return [*self.indexes, *self.runs]

    def check(self, baseline: str | None) -> None:
        """Raises `UsageError` when there is no system, or a name is taken twice, unusable or unknown."""
        if not self.names:
            raise UsageError("nothing to evaluate; give at least one index or run")
        twice = sorted(self.indexes.keys() & self.runs.keys())
        if twice:
            raise UsageError(f"{first(twice)}: an index and a run have the same name; rename one")
        for name in self.names:
            if not _NAME.fullmatch(name):
                raise UsageError(f"system name {name!r}: use letters, digits and . _ + - (it becomes a file's name)")
        for name in self.notes:
            if name not in self.names:
                raise UsageError(f"a note for '{name}', which is not a system{did_you_mean(name, self.names)}")
        if baseline is not None and baseline not in self.names:
            raise RecipeError(f"compare.baseline '{baseline}' is not a system{did_you_mean(baseline, self.names)}")


@dataclass(frozen=True)
class _Measured:
    """One system's run, its values (measure → query → value) and what the report says of it."""

    facts: dict[str, Any]
    values: dict[str, dict[str, float]]


class Evaluation:
    """One evaluation: a recipe applied to systems on a split."""

    Recipe: ClassVar[type[Recipe]] = EvaluationRecipe

    def __init__(self, recipe: EvaluationRecipe) -> None:
        self.recipe = recipe

    def report(self, collection: Collection, split: str, systems: Systems, out: Path, *, force: bool = False) -> Report:
        """The finished report at ``out``; the errors are those of `evaluate`."""
        systems.check(self.recipe.compare.baseline)
        indexes = {name: _index_ref(Path(path), collection) for name, path in systems.indexes.items()}
        runs = {name: _load_run(Path(path), collection) for name, path in systems.runs.items()}
        qrels = _judgments(collection, split)
        inputs = {"collection": collection.ref()}
        inputs |= {f"index:{name}": ref for name, ref in indexes.items()}
        inputs |= {f"run:{name}": run.ref() for name, run in runs.items()}
        plan = Plan("report", {**self.recipe.resolved(), "split": split}, inputs)
        if plan.finished(out, force=force):
            log.info("%s: already done", out)
            return Report.load(out)
        with plan.write(out, force=force) as draft:
            measured = []
            for name, path in systems.indexes.items():
                run, efficiency = self._search(Path(path), collection, split, list(qrels))
                run.save(draft.path / "runs" / f"{name}.trec", recipe=plan.recipe, inputs=inputs)
                facts: dict[str, Any] = {"name": name, "from": "index", "fingerprint": indexes[name].fingerprint}
                measured.append(self._measure(facts | {"efficiency": efficiency.to_json()}, run, qrels))
            for name, run in runs.items():
                facts = {"name": name, "from": "run", "fingerprint": run.ref().fingerprint}
                measured.append(self._measure(facts | {"efficiency": None}, self._without_itself(run), qrels))
            for one in measured:
                one.facts["note"] = systems.notes.get(one.facts["name"])
            metrics = self._metrics(collection, split, qrels, measured)
            write_report(draft.path, metrics, {one.facts["name"]: one.values for one in measured})
            draft.counts.update(systems=len(measured), queries=len(qrels))
            draft.details.update(split=split, headline=self.recipe.measures[0])
        return Report.load(out)

    def _search(
        self, index: Path, collection: Collection, split: str, query_ids: Sequence[str]
    ) -> tuple[Run, Efficiency]:
        """The run of an index over the judged queries, and its costs."""
        from retrieval_kd.data.run import Run
        from retrieval_kd.eval.efficiency import measure_efficiency
        from retrieval_kd.search.searcher import Searcher

        texts = collection.queries(split)
        missing = [query_id for query_id in query_ids if query_id not in texts]
        if missing:
            raise DataError(
                f"{collection.path}: split '{split}' judges {len(missing)} unknown queries ({first(missing)})"
            )
        queries = [texts[query_id] for query_id in query_ids]
        searcher = Searcher.load(index, collection=collection)
        doc_ids: list[list[str]] = []
        scores: list[np.ndarray] = []
        with progress(f"searching {index}", len(queries)) as advance:
            for start in range(0, len(queries), _BATCH):
                batch = queries[start : start + _BATCH]
                found = searcher.search_many(batch, self.recipe.k + self.recipe.skip_query_itself)
                doc_ids += found[0]
                scores += found[1]
                advance(len(batch))
        run = self._without_itself(Run.from_hits(list(query_ids), doc_ids, scores), self.recipe.k)
        not_empty = [query for query in queries if query.strip()]
        return run, measure_efficiency(index, searcher, not_empty, self.recipe.latency_queries)

    def _without_itself(self, run: Run, k: int | None = None) -> Run:
        """The run without hits on the query's own id, if the recipe asks for that, cut to ``k`` hits a query."""
        from retrieval_kd.data.run import Run

        if not self.recipe.skip_query_itself:
            return run
        doc_ids, scores = [], []
        for query_id, ids, values in run:
            keep = [i for i, doc_id in enumerate(ids) if doc_id != query_id][:k]
            doc_ids.append([ids[i] for i in keep])
            scores.append(values[keep])
        return Run.from_hits(run.query_ids, doc_ids, scores)

    def _measure(self, facts: dict[str, Any], run: Run, qrels: Mapping[str, Mapping[str, int]]) -> _Measured:
        ignored = [query_id for query_id in run.query_ids if query_id not in qrels]
        if len(run) and len(ignored) == len(run):
            raise InputError(
                f"run '{facts['name']}' answers none of the {len(qrels)} judged queries, but {first(ignored)}; "
                "is it of another split?"
            )
        hits = [run.hits(query_id) for query_id in qrels]
        values = evaluate_run(run, qrels, self.recipe.measures)
        facts |= {
            "queries_without_hits": sum(not len(doc_ids) for doc_ids, _ in hits),
            "queries_not_judged": len(ignored),
            "depth": max((len(doc_ids) for doc_ids, _ in hits), default=0),
            "hits": sum(len(doc_ids) for doc_ids, _ in hits),
            "tied_hits": sum(_tied(scores) for _, scores in hits),
            "means": {name: float(np.mean(list(row.values()))) for name, row in values.items()},
        }
        return _Measured(facts, values)

    def _metrics(
        self, collection: Collection, split: str, qrels: Mapping[str, Mapping[str, int]], measured: Sequence[_Measured]
    ) -> dict[str, Any]:
        """Everything that the report says, as plain values."""
        from retrieval_kd.eval.efficiency import machine
        from retrieval_kd.eval.significance import compare_systems, percentile_interval, resampled_means

        bootstrap, headline = self.recipe.bootstrap, self.recipe.measures[0]
        tested = self.recipe.compare.measure or headline
        means = resampled_means(_matrix(measured, headline), bootstrap.samples, bootstrap.seed)
        for system, column in zip(measured, means.T, strict=True):
            system.facts["interval"] = percentile_interval(column, bootstrap.confidence)._asdict()
        values = _matrix(measured, tested)
        if tested != headline:
            means = resampled_means(values, bootstrap.samples, bootstrap.seed)
        names = [system.facts["name"] for system in measured]
        baseline = self.recipe.compare.baseline
        comparisons = compare_systems(names, values, means, bootstrap.confidence, baseline)
        relevant = [sum(grade > 0 for grade in row.values()) for row in qrels.values()]
        return {
            "collection": {
                "name": collection.name,
                "fingerprint": collection.fingerprint,
                "documents": len(collection.documents),
                "split": split,
                "queries": len(qrels),
                "judgments": sum(len(row) for row in qrels.values()),
                "relevant": sum(relevant),
                "queries_without_relevant": relevant.count(0),
            },
            "headline": headline,
            "measures": {name: about(name) for name in self.recipe.measures},
            "systems": [system.facts for system in measured],
            "compared": tested,
            "comparisons": [comparison._asdict() for comparison in comparisons],
            "machine": machine(),
            "software": software_versions(),
            "recipe": self.recipe.resolved(),
        }


def evaluate(
    recipe: str,
    *,
    collection: str | Path | Collection,
    split: str,
    out: str | Path,
    indexes: Mapping[str, str | Path] | None = None,
    runs: Mapping[str, str | Path] | None = None,
    overrides: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
    force: bool = False,
) -> Report:
    """The report on indexes and runs (name → path) over the judged queries of a split, as the recipe says.

    ``notes`` (name → a line) stand under the systems' names; like times, they are no part of what makes two reports
    the same. Raises `RecipeError` and `UsageError` for a bad recipe or bad names, `ArtifactError` for an index or a
    run of another collection, `InputError` for a split without judgments or a run without any judged query.
    """
    from retrieval_kd.data.sources import open_collection

    loaded = load_recipe(recipe, "eval", overrides)
    evaluation: Evaluation = implementation("eval", loaded.kind)(loaded)
    systems = Systems(indexes or {}, runs or {}, notes or {})
    return evaluation.report(open_collection(collection), split, systems, Path(out), force=force)


def _judgments(collection: Collection, split: str) -> dict[str, dict[str, int]]:
    """The judged queries of a split in the order of their ids, so that a report does not hang on a file's order."""
    qrels = {query_id: row for query_id, row in sorted(collection.qrels(split).items()) if row}
    if not qrels:
        raise InputError(
            f"{collection.path}: split '{split}' has no judgments (splits: {', '.join(collection.splits)})"
        )
    return qrels


def _index_ref(path: Path, collection: Collection) -> InputRef:
    manifest = Manifest.read(resolve(path))
    if manifest.artifact != "index":
        raise ArtifactError(f"{path}: this is a {manifest.artifact} artifact; an index is needed here")
    _refuse_other_collection(path, manifest, collection, required=True)
    return InputRef(manifest.fingerprint, path)


def _load_run(path: Path, collection: Collection) -> Run:
    from retrieval_kd.data.run import Run

    if is_artifact(path):
        _refuse_other_collection(path, Manifest.read(resolve(path)), collection, required=False)
    return Run.load(path)


def _refuse_other_collection(path: Path, manifest: Manifest, collection: Collection, *, required: bool) -> None:
    made_from = [manifest.inputs[name]["fingerprint"] for name in input_names(manifest.inputs, "collection")]
    if not made_from:
        if required:
            raise ArtifactError(f"{path}: does not say from which collection it was made; build it again")
        return
    if collection.fingerprint not in made_from:
        raise ArtifactError(
            f"{path}: was made from another collection "
            f"(fingerprint {' or '.join(fingerprint[:12] for fingerprint in made_from)}) than "
            f"{collection.path} (fingerprint {collection.fingerprint[:12]})"
        )


def _tied(scores: np.ndarray) -> int:
    """The number of hits that share their score with another of the same query."""
    _, counts = np.unique(scores, return_counts=True)
    return int(counts[counts > 1].sum())


def _matrix(measured: Sequence[_Measured], name: str) -> Floats:
    return np.array([list(system.values[name].values()) for system in measured], dtype=np.float64)
