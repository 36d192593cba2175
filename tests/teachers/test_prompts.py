from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import tiny

from retrieval_kd.errors import RecipeError
from retrieval_kd.models.prompts import Prompt, load_prompt
from retrieval_kd.teachers.base import ModelTeacherRecipe
from retrieval_kd.teachers.prompted import PromptedRecipe, prompt_of

POINTWISE = {"kind": "pointwise", "text": "{query} {document}", "positive": "yes", "negative": "no"}
LISTWISE = {"kind": "listwise", "text": "{query}\n{passages}"}


def prompt(**values: Any) -> Prompt:
    return Prompt.model_validate(values)


def test_prompts_that_models_were_trained_on() -> None:
    """The exact texts; a space more would be another prompt."""
    qwen = load_prompt("qwen3-reranker")
    assert qwen.pointwise("Q", "D") == (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
        "<Query>: Q\n<Document>: D<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert (qwen.positive, qwen.negative) == ("yes", "no")
    mono = load_prompt("monot5")
    assert mono.pointwise("Q", "D") == "Query: Q Document: D Relevant:"
    assert (mono.positive, mono.negative) == ("true", "false")
    system, user = load_prompt("first").listwise("Q", ["x", "y [B] [7]"])
    assert system == {
        "role": "system",
        "content": "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the "
        "query",
    }
    assert user == {
        "role": "user",
        "content": "I will provide you with 2 passages, each indicated by an alphabetical identifier []. Rank the "
        "passages based on their relevance to the search query: Q.\n[A] x\n[B] y (B) (7)\nSearch Query: Q.\nRank the 2 "
        "passages above based on their relevance to the search query. All the passages should be included and listed "
        "using identifiers, in descending order of relevance. The output format should be [] > [], e.g., [B] > [A], "
        "Answer concisely and directly and only respond with the ranking results, do not say any word or explain.",
    }


def test_one_turn_a_passage() -> None:
    """RankGPT: question and receipt of each passage alternate between the first and the last turn."""
    turns = load_prompt("rankgpt").listwise("Q", ["x", "y"])
    assert [(turn["role"], turn["content"]) for turn in turns[3:7]] == [
        ("user", "[1] x"),
        ("assistant", "Received passage [1]."),
        ("user", "[2] y"),
        ("assistant", "Received passage [2]."),
    ]
    assert [turn["role"] for turn in turns[:3] + turns[7:]] == ["system", "user", "assistant", "user"]
    assert turns[1]["content"].startswith("I will provide you with 2 passages")


@pytest.mark.parametrize("name", ["monot5", "qwen3-reranker", "relevant-yes-no", "rankzephyr", "first", "rankgpt"])
def test_shipped_prompts(name: str) -> None:
    """Every placeholder is filled, and braces of a text stay what they are."""
    shipped = load_prompt(name)
    assert shipped == load_prompt(f"{name}.yaml")
    if shipped.kind == "pointwise":
        text = str(shipped.pointwise("{document} q", "{query} d"))
        assert text.count("{document} q") == 1 and text.count("{query} d") == 1
    else:
        text = str(shipped.listwise("{passages} q", ["{query} d", "{number}"]))
        assert text.count("{passages} q") == 2 and text.count("{query} d") == 1 and text.count("{number}") == 1
    assert "{instruction}" not in text and "{identifier}" not in text


def test_instruction() -> None:
    made = prompt(**POINTWISE | {"text": "{instruction}: {query} {document}", "instruction": "usual"})
    assert (made.pointwise("q", "d"), made.pointwise("q", "d", "other")) == ("usual: q d", "other: q d")
    assert made.takes_instruction and not prompt(**POINTWISE).takes_instruction


def test_identifiers() -> None:
    numbers, letters = prompt(**LISTWISE), prompt(**LISTWISE, identifiers="letters")
    assert numbers.identifiers_of(3) == ["1", "2", "3"] and letters.identifiers_of(3) == ["A", "B", "C"]
    assert (numbers.most_passages, letters.most_passages) == (None, 26)
    with pytest.raises(RecipeError, match="27 passages in a window, but there are 26 letters"):
        letters.identifiers_of(27)
    assert numbers.listwise("q", ["see [1] and [34] and [A]"]) == "q\n[1] see (1) and (34) and [A]"
    assert letters.listwise("q", ["[A] [B] [1]", "."]) == "q\n[A] (A) (B) (1)\n[B] ."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (POINTWISE | {"text": "{query}"}, r"the placeholder \{document\} is missing"),
        (POINTWISE | {"text": "{query} {document} {passages}"}, r"a pointwise prompt has no \{passages\}"),
        (POINTWISE | {"messages": []}, "give either text: or messages:"),
        (POINTWISE | {"negative": None}, "needs positive: and negative:, or grades:"),
        (POINTWISE | {"grades": [0, 3]}, "needs positive: and negative:, or grades:"),
        (POINTWISE | {"positive": None, "negative": None, "grades": [3, 0]}, "the lowest comes first"),
        (POINTWISE | {"positiv": "yes"}, r"unknown key 'positiv' \(did you mean 'positive'\?\)"),
        (LISTWISE | {"text": "{query}"}, r"the placeholder \{passages\} is missing"),
        (LISTWISE | {"passage": "{document}"}, r"passage: the placeholder \{identifier\} is missing"),
        ([1], "a prompt is a mapping"),
        (
            POINTWISE | {"text": "{instrution} {query} {document}"},
            r"no \{instrution\} \(did you mean 'instruction'\?\)",
        ),
        (LISTWISE | {"text": "{num} {query} {passages}"}, r"no \{num\} \(did you mean 'number'\?\)"),
        (LISTWISE | {"text": "{query} {passages} {document}"}, r"a listwise prompt has no \{document\}"),
        (LISTWISE | {"passage": "[{identifier}] {document} {passages}"}, r"passage has no \{passages\}"),
        (POINTWISE | {"instruction": "find {query}"}, r"instruction has no \{query\}, which would be sent as it is"),
        (POINTWISE | {"answer_start": "{document}"}, r"answer_start has no \{document\}"),
        (POINTWISE | {"positive": ""}, "positive: and negative: are words, not empty"),
        (POINTWISE | {"positive": "No "}, "positive: and negative: are the same answer, 'No '"),
    ],
)
def test_prompt_files_that_cannot_be_right(values: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- 1") if isinstance(values, list) else tiny.write_recipe(path, values)
    with pytest.raises(RecipeError, match=f"mine.yaml: .*{message}"):
        load_prompt(str(path))


@pytest.mark.parametrize(
    ("kind", "turns", "message"),
    [
        ("pointwise", ["{query} {document}", "*{document}"], "a pointwise prompt has no turn with each_passage"),
        (
            "listwise",
            ["{query}", "*[{identifier}]", "*received"],
            r"each_passage: the placeholder \{document\} is missing",
        ),
        ("listwise", ["{query}", "*{document}"], r"each_passage: the placeholder \{identifier\} is missing"),
        ("listwise", ["{query}", "*[{identifier}] {document} {passages}"], r"each_passage has no \{passages\}"),
        ("listwise", ["{query} {document}", "*[{identifier}] {document}"], r"a listwise prompt has no \{document\}"),
        (
            "listwise",
            ["{query} {identifier}", "*[{identifier}] {document}"],
            r"a listwise prompt has no \{identifier\}",
        ),
        ("listwise", ["rank", "*[{identifier}] {document} {query}"], r"a listwise prompt: the .* \{query\} is missing"),
        ("listwise", ["{query}"], r"the placeholder \{passages\} is missing"),
    ],
)
def test_turns_that_cannot_be_right(kind: str, turns: list[str], message: str, tmp_path: Path) -> None:
    """A turn with ``*`` has each_passage."""
    answers = {"positive": "yes", "negative": "no"} if kind == "pointwise" else {}
    messages = [{"role": "user", "content": turn.strip("*"), "each_passage": turn.startswith("*")} for turn in turns]
    path = tiny.write_recipe(tmp_path / "mine.yaml", {"kind": kind, "messages": messages, **answers})
    with pytest.raises(RecipeError, match=f"mine.yaml: .*{message}"):
        load_prompt(path)


def test_turns_together_show_the_passage() -> None:
    """The identifier in one turn, the document in the next."""
    turns = ["{query} {number}", "*[{identifier}]", "*{document}"]
    messages = [{"role": "user", "content": turn.strip("*"), "each_passage": turn.startswith("*")} for turn in turns]
    shown = prompt(kind="listwise", messages=messages).listwise("q", ["x", "{query}"])
    assert [turn["content"] for turn in shown if isinstance(turn, dict)] == ["q 2", "[1]", "x", "[2]", "{query}"]


def test_names_that_are_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"prompt 'frist': no such file, .* \(did you mean 'first'\?\)"):
        load_prompt("frist")
    (tmp_path / "broken.yaml").write_text("kind: [")
    with pytest.raises(RecipeError, match=r"broken.yaml: cannot be read as YAML"):
        load_prompt(str(tmp_path / "broken.yaml"))


class Recipe(PromptedRecipe, ModelTeacherRecipe):
    kind: Literal["made"] = "made"


def test_recipe_and_prompt_go_together(tmp_path: Path) -> None:
    mono = Recipe(model="m", prompt="monot5")
    assert prompt_of(mono, "pointwise") == load_prompt("monot5")
    with pytest.raises(RecipeError, match="prompt 'monot5' is pointwise; kind made needs a listwise prompt"):
        prompt_of(mono, "listwise")
    with pytest.raises(RecipeError, match=r"prompt 'monot5' has no \{instruction\}"):
        prompt_of(Recipe(model="m", prompt="monot5", instruction="find it"), "pointwise")


def test_identity_changes_with_the_prompts_content(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    tiny.write_recipe(path, POINTWISE)
    recipe = Recipe(model="m", prompt=str(path))
    before = recipe.identity()
    assert before["prompt_sha256"] == load_prompt(str(path)).sha256 and before["model"] == "m"
    tiny.write_recipe(path, POINTWISE | {"text": "{query}: {document}"})
    assert recipe.identity() != before
