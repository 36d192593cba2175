"""Memory and speed of importing a triples file: peak resident memory must not follow the number of rows.

Run: python benchmarks/convert_memory.py --rows 5000000
Each size runs in a process of its own; growth is that process's peak (VmHWM) above what it had before the import.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

QUERIES, DOCUMENTS = 400_000, 1_000_000
_AT_ONCE = 500_000


def write_triples(path: Path, rows: int, seed: int = 0) -> None:
    """Rows of the layout hofstaetter-tsv: queries spread over the file, a query's positive fixed, negatives random.

    A score is a function of query and document, so that pairs that occur again have the score they had.
    """
    import pyarrow as pa
    import pyarrow.csv as csv

    generator = np.random.default_rng(seed)
    options = csv.WriteOptions(include_header=False, delimiter="\t")
    columns = ["pos_score", "neg_score", "query_id", "pos_id", "neg_id"]
    with path.open("wb") as file:
        for start in range(0, rows, _AT_ONCE):
            n = min(_AT_ONCE, rows - start)
            query = generator.integers(0, QUERIES, n)
            positive, negative = query * 2 % DOCUMENTS, generator.integers(0, DOCUMENTS, n)
            scores = [
                ((query * 31 + document * 7) % 20_011 / 1000).astype(np.float32) for document in (positive, negative)
            ]
            csv.write_csv(pa.table([*scores, query, positive, negative], columns), file, options)


def measure(source: Path) -> dict[str, float]:
    """Seconds, counts, and by how many MB an import raises the peak of this process."""
    import pyarrow.parquet  # noqa: F401

    from retrieval_kd.data.score_formats.convert import convert_scores
    from retrieval_kd.data.scores import Scores

    before, began = _peak(), time.perf_counter()
    out = source.with_suffix(".scores")
    scores = convert_scores(source, from_format="hofstaetter-tsv", to_format="retrieval-kd", out=out)
    seconds = time.perf_counter() - began
    assert isinstance(scores, Scores)
    return {"seconds": seconds, "growth_mb": (_peak() - before) / 1024, **scores.manifest.counts}


def _peak() -> int:
    """The peak resident memory of this process in KiB; unlike ru_maxrss it does not start from the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Prints a line for a tenth of the rows and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--measure", nargs="+", type=Path, metavar="TSV", help="import these and print JSON lines")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for path in arguments.measure or ():
        print(json.dumps(measure(path)))
    if arguments.measure:
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in (arguments.rows // 10, arguments.rows):
            source = Path(folder) / f"{rows}.tsv"
            write_triples(source, rows)
            command = [sys.executable, __file__, "--measure", str(source)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            runs.append({"rows": rows, **found})
            print(
                f"{rows:,} rows ({source.stat().st_size / 1e6:.0f} MB): {found['seconds']:.1f} s, "
                f"{rows / found['seconds']:,.0f} rows/s, peak +{found['growth_mb']:.0f} MB, {found['pairs']:,} pairs, "
                f"{found['queries']:,} queries, {found['repeated_pairs']:,} repeated"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
