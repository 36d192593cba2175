"""Prompts that language models rank by: YAML files under ``teachers/prompts/``, checked, rendered and hashed.

A prompt is raw ``text`` for the tokenizer, or chat ``messages``. Placeholders are ``{query}``, ``{document}`` and
``{instruction}`` in a pointwise prompt; ``{query}``, ``{number}`` and ``{passages}`` in a listwise one, whose
``passage`` line, or turns with ``each_passage``, have ``{identifier}`` and ``{document}``. No other word may stand in
braces.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from retrieval_kd.errors import RecipeError, did_you_mean
from retrieval_kd.recipe import Section, recipe_roots, validate

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")
_NEEDED = {"pointwise": {"query", "document"}, "listwise": {"query", "passages"}}
_ALLOWED = {"pointwise": {"query", "document", "instruction"}, "listwise": {"query", "passages", "number"}}
_NEEDED_OF_PASSAGE = {"identifier", "document"}
_ALLOWED_OF_PASSAGE = _NEEDED_OF_PASSAGE | {"query", "number"}


class Message(Section):
    """One turn of a chat. A turn with ``each_passage`` is repeated for every passage of a window."""

    role: Literal["system", "user", "assistant"]
    content: str
    each_passage: bool = False


class Prompt(Section):
    """A prompt file. Exactly one of ``text`` and ``messages`` is given."""

    kind: Literal["pointwise", "listwise"]
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    answer_start: str = ""
    """What the model's answer is made to begin with, such as ``[``."""
    instruction: str = ""
    """The value of ``{instruction}`` where the recipe gives none."""
    positive: str | None = None
    """Pointwise: the answer (one token) that says relevant."""
    negative: str | None = None
    grades: tuple[int, int] | None = None
    """Pointwise, instead of two answers: the lowest and the highest grade that an answer may give."""
    passage: str = "[{identifier}] {document}"
    identifiers: Literal["numbers", "letters"] = "numbers"
    passage_words: int | None = Field(default=None, ge=1)
    """Listwise: a passage is cut to this many words before anything else."""

    @model_validator(mode="after")
    def _placeholders_are_there(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text: or messages:")
        of_passage = [message.content for message in self.messages or () if message.each_passage]
        ordinary = [self.text or ""] + [message.content for message in self.messages or () if not message.each_passage]
        needed = _NEEDED[self.kind]
        if of_passage:
            if self.kind == "pointwise":
                raise ValueError("a pointwise prompt has no turn with each_passage:, it shows one document")
            _check_placeholders(of_passage, "a turn with each_passage", _NEEDED_OF_PASSAGE, _ALLOWED_OF_PASSAGE)
            needed = needed - {"passages"}
        _check_placeholders(ordinary, f"a {self.kind} prompt", needed, _ALLOWED[self.kind])
        if self.kind == "listwise":
            _check_placeholders([self.passage], "passage", _NEEDED_OF_PASSAGE, _ALLOWED_OF_PASSAGE)
        _check_placeholders([self.instruction], "instruction", set(), set())
        _check_placeholders([self.answer_start], "answer_start", set(), set())
        return self

    @model_validator(mode="after")
    def _answers_can_be_told_apart(self) -> Self:
        answers = [answer.strip().lower() for answer in (self.positive, self.negative) if answer is not None]
        if self.kind == "pointwise" and (len(answers) < 2) == (self.grades is None):
            raise ValueError("a pointwise prompt needs positive: and negative:, or grades: [lowest, highest]")
        if not all(answers):
            raise ValueError("positive: and negative: are words, not empty")
        if len(set(answers)) < len(answers):
            raise ValueError(f"positive: and negative: are the same answer, '{self.positive}'; take two that differ")
        if self.grades is not None and self.grades[0] >= self.grades[1]:
            raise ValueError("grades: the lowest comes first")
        return self

    @property
    def sha256(self) -> str:
        """Hash of everything the prompt says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def most_passages(self) -> int | None:
        """The number of identifiers there are, None for any number."""
        return len(LETTERS) if self.identifiers == "letters" else None

    @property
    def takes_instruction(self) -> bool:
        """It has a place for an instruction."""
        return any("{instruction}" in template for template in self._templates())

    def identifiers_of(self, n: int) -> list[str]:
        """The identifiers of a window of ``n`` passages: ``1``, ``2`` and so on, or ``A``, ``B``."""
        if self.identifiers == "numbers":
            return [str(i + 1) for i in range(n)]
        if n > len(LETTERS):
            raise RecipeError(f"{n} passages in a window, but there are {len(LETTERS)} letters; use a smaller window")
        return list(LETTERS[:n])

    def pointwise(self, query: str, document: str, instruction: str | None = None) -> str | list[dict[str, str]]:
        """The prompt for one pair: raw text, or chat messages (``role``, ``content``)."""
        values = {"query": query, "document": document, "instruction": instruction or self.instruction}
        return self._rendered(values, ())

    def listwise(self, query: str, passages: Sequence[str]) -> str | list[dict[str, str]]:
        """The prompt for a window; bracketed identifiers inside a passage become round, so that none is confused."""
        names = self.identifiers_of(len(passages))
        bracketed = re.compile(rf"\[({'|'.join(names)}|\d+)\]" if names else r"\[(\d+)\]")
        each = [
            {"identifier": name, "document": bracketed.sub(r"(\1)", text), "query": query, "number": str(len(names))}
            for name, text in zip(names, passages, strict=True)
        ]
        lines = "\n".join(_fill(self.passage, values) for values in each)
        return self._rendered({"query": query, "number": str(len(names)), "passages": lines}, each)

    def _templates(self) -> list[str]:
        return [self.text or ""] if self.messages is None else [message.content for message in self.messages]

    def _rendered(self, values: Mapping[str, str], each: Sequence[Mapping[str, str]]) -> str | list[dict[str, str]]:
        if self.messages is None:
            return _fill(self.text or "", values)
        turns: list[dict[str, str]] = []
        start = 0
        messages = list(self.messages)
        while start < len(messages):
            stop = start + 1
            if messages[start].each_passage:  # neighbouring turns alternate passage by passage
                while stop < len(messages) and messages[stop].each_passage:
                    stop += 1
            for of_passage in each if messages[start].each_passage else [values]:
                turns += [
                    {"role": message.role, "content": _fill(message.content, of_passage)}
                    for message in messages[start:stop]
                ]
            start = stop
        return turns


def load_prompt(name: str) -> Prompt:
    """The prompt called ``name`` (``qwen3-reranker``) or in the file ``name``. Raises `RecipeError` naming the file."""
    shipped = {
        path.stem: path for root in recipe_roots() for path in sorted((root / "teachers" / "prompts").glob("*.yaml"))
    }
    path = Path(name) if Path(name).is_file() else shipped.get(name.removesuffix(".yaml"))
    if path is None:
        raise RecipeError(f"prompt '{name}': no such file, and none in teachers/prompts/{did_you_mean(name, shipped)}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a prompt is a mapping with a 'kind:' key")
    return validate(Prompt, raw, str(path))


def prompt_for(kind: str, name: str, needed: Literal["pointwise", "listwise"]) -> Prompt:
    """The prompt called ``name`` for a recipe of ``kind``. Raises `RecipeError` when it is not the kind ``needed``."""
    prompt = load_prompt(name)
    if prompt.kind != needed:
        raise RecipeError(f"prompt '{name}' is {prompt.kind}; kind {kind} needs a {needed} prompt")
    return prompt


def _check_placeholders(templates: Sequence[str], what: str, needed: Set[str], allowed: Set[str]) -> None:
    """Raises `ValueError` for a placeholder that ``templates`` together lack, or that would be sent as it is."""
    found = {name: None for template in templates for name in _PLACEHOLDER.findall(template)}
    if unknown := [name for name in found if name not in allowed]:
        hint = did_you_mean(unknown[0], allowed) if allowed else ", which would be sent as it is"
        raise ValueError(f"{what} has no {{{unknown[0]}}}{hint}")
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{what}: the placeholder {' and '.join(f'{{{name}}}' for name in missing)} is missing")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with its placeholders replaced in one pass: braces in a text stay what they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
