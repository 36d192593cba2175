"""Effectiveness measures, named as ir_measures names them, per query and with trec_eval's order of ties.

ranx computes the measures whose definition it shares with trec_eval; the rest go to ir_measures' providers. Both are
given ranks, never scores, so that ties are broken in one place: `retrieval_kd.data.run.Run`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.errors import RecipeError, first

if TYPE_CHECKING:
    from retrieval_kd.data.run import Run

EXAMPLES = "nDCG@10, R@100, RR@10, AP, AP@100, P@5, Success@1, nDCG(dcg='exp-log2')@10"

_RANX = {
    ("nDCG", "log2"): "ndcg",
    ("nDCG", "exp-log2"): "ndcg_burges",
    ("R", None): "recall",
    ("RR", None): "reciprocal_rank",
    ("AP", None): "average_precision",
    ("P", None): "precision",
    ("Success", None): "hit_rate",
    ("Rprec", None): "r_precision",
}
"""(Measure, form of its gain) → the function of ``ranx.metrics`` with the same definition."""

_ABOUT = {
    "nDCG": "gain of the ranking (the grade of each hit / log2(rank + 1)) over that of the best ranking",
    "nDCG exp-log2": "as nDCG, but the gain is 2^grade − 1",
    "R": "share of a query's relevant documents that were found",
    "RR": "1 / rank of the first relevant document, 0 when none was found",
    "AP": "mean, over a query's relevant documents, of the precision at the rank of each; 0 for one not found",
    "P": "share of the ranks that hold a relevant document; ranks that a system left empty count as not relevant",
    "Success": "1 when a relevant document was found, else 0",
    "Rprec": "precision at rank R, where R is the query's number of relevant documents",
    "Judged": "share of the hits that were judged at all",
}


def parse_measures(names: Sequence[str]) -> list[Any]:
    """The ir_measures objects for names such as ``nDCG@10``; ``str(measure)`` is the canonical name.

    Raises `RecipeError` for a name that cannot be read, that no installed program computes, that has no mean over
    queries (counts such as NumRet), or that is given twice.
    """
    import ir_measures

    measures: list[Any] = []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
            measure.validate_params()
        except (ValueError, NameError, AssertionError, AttributeError) as error:
            raise RecipeError(f"measure {name!r} cannot be read ({error}); examples: {EXAMPLES}") from error
        cutoff = measure.params.get("cutoff", 1)
        if cutoff < 1:
            raise RecipeError(f"measure {name!r}: the cutoff must be 1 or more; examples: {EXAMPLES}")
        if not isinstance(measure.aggregator(), ir_measures.MeanAgg):
            raise RecipeError(f"measure {name!r} is a count, which has no mean over queries; examples: {EXAMPLES}")
        if _ranx_function(measure) is None and not ir_measures.DefaultPipeline.supports(measure):
            raise RecipeError(f"measure {name!r}: no installed program computes it; examples: {EXAMPLES}")
        if measure in measures:
            raise RecipeError(f"measure {name!r} is given twice")
        measures.append(measure)
    return measures


def depth_needed(names: Sequence[str]) -> int:
    """The number of hits a query that the deepest cutoff among the measures looks at; 0 when none has a cutoff."""
    return max((int(measure.params.get("cutoff", 0)) for measure in parse_measures(names)), default=0)


def about(name: str) -> str:
    """The definition of a measure in one sentence, with its cutoff and the lowest grade that counts as relevant."""
    (measure,) = parse_measures([name])
    key = "nDCG exp-log2" if measure.params.get("dcg") == "exp-log2" else measure.NAME
    text = _ABOUT.get(key, "as ir_measures defines it")
    cutoff = measure.params.get("cutoff")
    text += f"; first {cutoff} hits" if cutoff else "; all hits that the run holds"
    return text + (f"; relevant from grade {measure.params['rel']}" if "rel" in measure.params else "")


def evaluate_run(
    run: Run, qrels: Mapping[str, Mapping[str, int]], measures: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Measure name (as given) → query id → value in the order of ``qrels``, with a value for every query of ``qrels``.

    A query that the run lacks scores 0; so does, as in trec_eval, a query with no relevant document, and both count
    in a mean. Queries of the run that ``qrels`` lacks are left out. A grade below 1 is not relevant and has no gain.
    Raises `RecipeError` for a bad measure.
    """
    parsed = dict(zip(measures, parse_measures(measures), strict=True))
    by_ranx = {name: measure for name, measure in parsed.items() if _ranx_function(measure)}
    by_provider = {name: measure for name, measure in parsed.items() if name not in by_ranx}
    ranked = {query_id: run.hits(query_id)[0] for query_id in qrels}
    values = _by_ranx(ranked, qrels, by_ranx) | _by_provider(ranked, qrels, by_provider)
    bad = [f"{name} of query {query_id}" for name, row in values.items() for query_id, v in row.items() if v != v]
    if bad:
        raise RecipeError(f"{len(bad)} values are not numbers ({first(bad)}); choose another measure")
    return {name: values[name] for name in measures}


def _ranx_function(measure: Any) -> str | None:
    """The name in ``ranx.metrics`` when it computes exactly this measure, else None."""
    if measure.params.keys() - {"cutoff", "rel", "dcg"} or measure.params.get("rel", 1) < 1:
        return None
    form = measure.params.get("dcg", "log2") if measure.NAME == "nDCG" else None
    return _RANX.get((measure.NAME, form))


def _by_ranx(
    ranked: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, int]], measures: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    some = [q for q, doc_ids in ranked.items() if len(doc_ids) and any(grade > 0 for grade in qrels[q].values())]
    if not (measures and some):
        return values
    with _numba_warnings_ignored():
        from numba.typed import List
        from ranx import metrics

        pairs = [_numbered(ranked[query_id], qrels[query_id]) for query_id in some]
        judged, hits = List([pair[0] for pair in pairs]), List([pair[1] for pair in pairs])
        for name, measure in measures.items():
            function = getattr(metrics, str(_ranx_function(measure)))
            found = function(judged, hits, measure.params.get("cutoff", 0), measure.params.get("rel", 1))
            values[name].update(zip(some, found.tolist(), strict=True))
    return values


def _numbered(doc_ids: Sequence[str], grades: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """ranx's own arrays, [judged, 2] and [hits, 2], of (document number, grade or falling score).

    The number is the document's rank; judged documents that were not found get the numbers after the last rank. This
    spares ranx its hash of the ids, which it rounds to a float, and its compilation for every length of id.
    """
    number = {doc_id: rank for rank, doc_id in enumerate(doc_ids)}
    for doc_id in grades:
        number.setdefault(doc_id, len(number))
    falling = sorted(grades.items(), key=lambda item: -item[1])
    judged = np.array([(number[doc_id], grade) for doc_id, grade in falling], dtype=np.float64)
    ranks = np.arange(len(doc_ids), dtype=np.float64)
    return judged, np.column_stack((ranks, len(doc_ids) - ranks))


def _by_provider(
    ranked: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, int]], measures: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    values = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    if not measures:
        return values
    import ir_measures

    run = {q: {d: float(len(ids) - rank) for rank, d in enumerate(ids)} for q, ids in ranked.items() if len(ids)}
    grades = {query_id: dict(row) for query_id, row in qrels.items()}
    with _numba_warnings_ignored():
        for name, measure in measures.items():
            # One at a time: asked together, the pytrec_eval provider lends one nDCG the gains of another.
            for metric in ir_measures.iter_calc([measure], grades, run):
                if metric.query_id in run:
                    values[name][metric.query_id] = float(metric.value)
    return values


@contextmanager
def _numba_warnings_ignored() -> Iterator[None]:
    """Hides the one warning that numba gives each time it compiles a loop over a typed list."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unsafe cast from uint64 to int64")
        yield
