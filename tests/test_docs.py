from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from retrieval_kd.cli import app
from retrieval_kd.registry import STAGES

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / stage / "README.md" for stage in STAGES),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(retrieval-kd [^`]+)`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The content of the fenced blocks in these languages."""
    text = page.read_text(encoding="utf-8")
    return [content for language, content in FENCE.findall(text) if language in languages]


def block_commands(page: Path) -> list[list[str]]:
    """The words after ``retrieval-kd`` of each command in the shell blocks; continued lines are joined."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("retrieval-kd ")]


def inline_commands(page: Path) -> list[list[str]]:
    """The words after ``retrieval-kd`` of each command in the text; ``retrieval-kd VERB`` names none."""
    found = [shlex.split(text)[1:] for text in INLINE.findall(page.read_text(encoding="utf-8").replace("\n", " "))]
    return [words for words in found if words[0] != "VERB"]


def verb_of(words: list[str]) -> tuple[Any, list[str]]:
    """The click command that these words call and the words that are left for it."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest, f"{words}: no verb"
        assert rest[0] in command.commands, f"{words}: no verb {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    return command, rest


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree() -> set[str]:
    """The files and folders of the README's tree, as paths; two blanks of indentation a level."""
    (block,) = [block for block in blocks(README, "") if "pyproject.toml" in block]
    names: set[str] = set()
    folders: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        # One line names several files without a word about them.
        cells = line.split() if re.fullmatch(r"\S+\.md( +\S+)*", line) else [line.split()[0]]
        names |= {"".join(folders) + cell for cell in cells}
        if cells[0].endswith("/"):
            folders.append(cells[0])
    return names


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place) if place else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@each_page
def test_every_verb_and_option_exists(page: Path) -> None:
    for words in block_commands(page) + inline_commands(page):
        command, rest = verb_of(words)
        valid = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= valid, f"{page.name}: retrieval-kd {' '.join(words)}"


@each_page
def test_every_command_in_a_block_is_complete(page: Path) -> None:
    for words in block_commands(page):
        command, rest = verb_of(words)
        command.make_context(command.name, rest)  # raises for a missing or superfluous argument


def test_the_pages_show_the_whole_pipeline() -> None:
    shown = {words[0] for words in block_commands(README)}
    assert shown >= {"data", "index", "search", "encode", "score", "train", "eval"}
    labels = (REPOSITORY / "docs" / "pipeline_figure.py").read_text(encoding="utf-8")
    assert all(f'"{verb}"' in labels for verb in shown)


def test_every_verb_is_described() -> None:
    design = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    command: Any = typer.main.get_command(app)
    missing = [verb for verb in command.commands if not re.search(rf"`{verb}[` ]", design)]
    assert missing == []


def test_the_tree_names_every_file_once_and_nothing_else() -> None:
    folders = [REPOSITORY / "docs", *(REPOSITORY / stage for stage in STAGES)]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    files += [
        path
        for path in (REPOSITORY / "retrieval_kd").rglob("*")
        if path.suffix in {".py", ".j2"} and path.name != "__init__.py"
    ]
    named = tree()
    assert {path.relative_to(REPOSITORY).as_posix() for path in files} - named == set()
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_describes_each_of_its_recipes(stage: str) -> None:
    page = (REPOSITORY / stage / "README.md").read_text(encoding="utf-8")
    missing = [path.stem for path in (REPOSITORY / stage).glob("*.yaml") if f"| `{path.stem}` |" not in page]
    assert missing == []
