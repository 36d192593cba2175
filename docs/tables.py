"""Writes the tables of kinds in docs/recipes.md from the registry: ``python docs/tables.py``."""

from __future__ import annotations

import re
from pathlib import Path

from retrieval_kd.recipe import read_recipe, recipe_roots
from retrieval_kd.registry import STAGES

PAGE = Path(__file__).parent / "recipes.md"
_TABLE = re.compile(r"(<!-- kinds: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(stage: str) -> str:
    """The Markdown table of a stage's kinds: kind, what it is, the extra it needs, the shipped recipes of it."""
    rows = ["| kind | what it is | extra | recipes |", "|---|---|---|---|"]
    recipes = _recipes_by_kind(stage)
    for kind, entry in STAGES[stage].items():
        names = ", ".join(f"`{stage}/{name}`" for name in recipes.get(kind, []))
        rows.append(f"| `{kind}` | {entry.summary} | {f'`[{entry.extra}]`' if entry.extra else ''} | {names} |")
    return "\n".join(rows) + "\n"


def with_tables(page: str) -> str:
    """The page with every table between its markers made anew."""
    return _TABLE.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def _recipes_by_kind(stage: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for root in recipe_roots():
        for path in sorted((root / stage).glob("*.yaml")):
            found.setdefault(str(read_recipe(path, stage).get("kind")), []).append(path.stem)
    return found


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
