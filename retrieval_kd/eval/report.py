"""The report: one dictionary of results, written as Markdown, HTML, JSON and Parquet, and read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.artifact import Artifact
from retrieval_kd.atomic import write_atomically

if TYPE_CHECKING:
    from rich.table import Table

METRICS = "metrics.json"
PER_QUERY = "per_query.parquet"
_TEMPLATES = Path(__file__).parent / "templates"
_UNKNOWN = "–"


class Report(Artifact):
    """A finished evaluation."""

    kind = "report"

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``: everything in the report's tables."""
        content: dict[str, Any] = json.loads((self.path / METRICS).read_text(encoding="utf-8"))
        return content

    @property
    def rows(self) -> list[list[str]]:
        """The table of systems as text, its heading first."""
        return system_rows(self.metrics)

    @property
    def sentences(self) -> list[str]:
        """What the comparisons show, one sentence each."""
        return [sentence(self.metrics, comparison) for comparison in self.metrics["comparisons"]]

    def per_query(self) -> dict[str, dict[str, dict[str, float]]]:
        """System → measure → query id → value."""
        import pyarrow.parquet as pq

        values: dict[str, dict[str, dict[str, float]]] = {}
        for row in pq.read_table(self.path / PER_QUERY).to_pylist():
            values.setdefault(row["system"], {}).setdefault(row["measure"], {})[row["query_id"]] = row["value"]
        return values

    def problems(self) -> list[str]:
        """Means that are not those of the values per query, and queries that were skipped, in words."""
        values, found = self.per_query(), []
        for system in self.metrics["systems"]:
            for name, mean in system["means"].items():
                row = values.get(system["name"], {}).get(name, {})
                if len(row) != self.metrics["collection"]["queries"]:
                    found.append(f"{PER_QUERY}: {system['name']} has {len(row)} values of {name}, not one a query")
                elif not math.isclose(math.fsum(row.values()) / len(row), mean, abs_tol=1e-9):
                    found.append(f"{METRICS}: the mean {name} of {system['name']} is not that of {PER_QUERY}")
        return found


def report_table(report: Report) -> Table:
    """The table of systems × measures and costs, to be printed with rich."""
    from rich.table import Table

    head, *body = report.rows
    place = report.metrics["collection"]
    table = Table(title=f"{place['name']}, {place['split']}: {place['queries']:,} judged queries")
    for position, name in enumerate(head):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in body:
        table.add_row(*row)
    return table


def write_report(
    folder: Path, metrics: Mapping[str, Any], values: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> None:
    """Writes ``metrics.json``, ``per_query.parquet``, ``report.md`` and ``report.html`` into ``folder``.

    ``values`` is system → measure → query id → value.
    """
    from retrieval_kd.eval.pictures import pictures

    text = json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / METRICS, (text + "\n").encode())
    _write_per_query(folder / PER_QUERY, values)
    write_atomically(folder / "report.md", _render("report.md.j2", metrics, []).encode())
    write_atomically(folder / "report.html", _render("report.html.j2", metrics, pictures(metrics)).encode())


def system_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The table of systems as text, its heading first; the headline is given with its interval."""
    head = ["system", *metrics["measures"], "ms/query", "bytes/doc", "docs/s encoded"]
    rows = [head]
    for system in metrics["systems"]:
        row = [system["name"]]
        for name, mean in system["means"].items():
            low, high = system["interval"]["low"], system["interval"]["high"]
            row.append(f"{mean:.4f} [{low:.3f}, {high:.3f}]" if name == metrics["headline"] else f"{mean:.4f}")
        costs = system["efficiency"] or {}
        row += [significant(costs.get("milliseconds_per_query")), significant(costs.get("bytes_per_document"))]
        rows.append([*row, significant(costs.get("documents_per_second"))])
    return rows


def comparison_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The table of paired comparisons as text, its heading first."""
    confidence = f"{metrics['recipe']['bootstrap']['confidence']:.0%} interval"
    rows = [["A", "B", "mean of A − B", confidence, "p", "p (Holm)"]]
    for one in metrics["comparisons"]:
        interval = f"{signed(one['low'])} to {signed(one['high'])}"
        ps = [p_text(one[name]).removeprefix("= ") for name in ("p", "p_holm")]
        rows.append([one["a"], one["b"], signed(one["difference"]), interval, *ps])
    return rows


def sentence(metrics: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    """What one comparison shows, in words; the corrected p-value decides."""
    a, b, difference, low, high = (comparison[key] for key in ("a", "b", "difference", "low", "high"))
    confidence, measure = metrics["recipe"]["bootstrap"]["confidence"], metrics["compared"]
    if comparison["p_holm"] < 1 - confidence:
        if difference < 0:
            a, b, difference, low, high = b, a, -difference, -high, -low
        start = f"{a} is better than {b} by {difference:.4f} {measure}"
    else:
        start = f"No difference in {measure} can be shown between {a} and {b}: {a} − {b} is {signed(difference)}"
    return f"{start} ({confidence:.0%} interval {signed(low)} to {signed(high)}, p {p_text(comparison['p_holm'])})."


def significant(value: float | None) -> str:
    """A cost with three significant digits or all of its whole ones; a dash when it is not known."""
    if value is None:
        return _UNKNOWN
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def signed(value: float) -> str:
    """A difference with its sign and four decimals."""
    return f"{value:+.4f}".replace("-", "−")


def p_text(p: float) -> str:
    """``= 0.012``, or ``< 0.001`` below that."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _write_per_query(path: Path, values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        (system, query_id, measure, value)
        for system, measures in values.items()
        for measure, row in measures.items()
        for query_id, value in row.items()
    ]
    columns = [list(column) for column in zip(*rows, strict=True)]
    types = [pa.string(), pa.string(), pa.string(), pa.float64()]
    arrays = [pa.array(column, type=kind) for column, kind in zip(columns, types, strict=True)]
    pq.write_table(pa.table(arrays, names=["system", "query_id", "measure", "value"]), path)


def _render(template: str, metrics: Mapping[str, Any], svgs: list[str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    depths = sorted({system["depth"] for system in metrics["systems"]})
    return environment.get_template(template).render(
        metrics=metrics,
        system_rows=system_rows(metrics),
        comparison_rows=comparison_rows(metrics),
        sentences=[sentence(metrics, comparison) for comparison in metrics["comparisons"]],
        remarks=_remarks(metrics, depths),
        notes={system["name"]: " ".join(system["note"].split()) for system in metrics["systems"] if system["note"]},
        pictures=svgs,
        recipe=json.dumps(metrics["recipe"], indent=2, ensure_ascii=False),
    )


def _remarks(metrics: Mapping[str, Any], depths: list[int]) -> list[str]:
    """How ties, missing queries and depth were treated, with the counts, in sentences."""
    place, recipe = metrics["collection"], metrics["recipe"]
    remarks = [
        "Hits are ordered by score, highest first; equal scores by document id, last first (trec_eval's order).",
        "A judged query for which a system returned nothing scores 0 and counts in every mean.",
        f"Judged queries without any relevant document: {place['queries_without_relevant']:,}; they score 0 and count "
        "in every mean, as in trec_eval.",
        "A document is relevant from grade 1, unless the measure says otherwise.",
    ]
    if recipe["skip_query_itself"]:
        remarks.append("A hit whose document id is the query's id was left out.")
    if len(depths) > 1 and any("@" not in name for name in metrics["measures"]):
        remarks.append(
            f"The runs are {depths[0]:,} to {depths[-1]:,} hits deep: measures without a cutoff favour the deeper."
        )
    if place["queries"] < 30:
        remarks.append(f"{place['queries']:,} judged queries are few: intervals and tests are rough.")
    if any(system["efficiency"] for system in metrics["systems"]):
        remarks.append(f"Indexes were searched {recipe['k']:,} hits deep.")
        machine = metrics["machine"]
        timed = max(system["efficiency"]["timed_queries"] for system in metrics["systems"] if system["efficiency"])
        remarks.append(
            f"ms/query is the median over {timed:,} queries searched one at a time, from the text to ten hits, "
            f"encoding included, on {machine['processor']}, {machine['system']}, {machine['threads']} threads; "
            "bytes/doc are the index's files without the ids; docs/s is the speed at which its documents were encoded."
        )
    return remarks
