"""What kinds share that ask a language model by a prompt: its keys, and how queries are read from an answer."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Self

from pydantic import Field, model_validator

from retrieval_kd.errors import did_you_mean
from retrieval_kd.models.api.reply import without_thoughts
from retrieval_kd.queries.base import DocumentQueriesRecipe

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")
_ALLOWED = ("document", "number")
_MARK = re.compile(r"^\s*(?:(?:[-*•]|\(?\d{1,3}[.):])\s+)?")
"""What a list puts before an item."""
_QUOTES = "\"'“”„«»`"


class PromptedRecipe(DocumentQueriesRecipe):
    """The keys of a kind that asks for queries in words."""

    prompt: str
    """The question, with ``{document}`` where the document goes and ``{number}`` for ``per_document``."""
    chat: bool = True
    """One turn of a chat, by the model's chat template; without, raw text that the model goes on with."""
    per_document: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _placeholders_are_there(self) -> Self:
        found = _PLACEHOLDER.findall(self.prompt)
        if unknown := [name for name in found if name not in _ALLOWED]:
            raise ValueError(f"prompt: {{{unknown[0]}}} would be sent as it is{did_you_mean(unknown[0], _ALLOWED)}")
        if "document" not in found:
            raise ValueError("prompt: the placeholder {document} is missing")
        if self.per_document > 1 and "number" not in found:
            raise ValueError("prompt: per_document above 1 needs the placeholder {number}, or ask for 1")
        return self

    @property
    def prompt_sha256(self) -> str:
        """Hash of all that the prompt says."""
        return hashlib.sha256(json.dumps([self.prompt, self.chat, self.per_document]).encode()).hexdigest()

    def rendered(self, document: str) -> str | list[dict[str, str]]:
        """The prompt about a document: raw text, or the messages of a chat. Braces in the document stay."""
        values = {"document": document, "number": str(self.per_document)}
        text = _PLACEHOLDER.sub(lambda match: values[match[1]], self.prompt)
        return [{"role": "user", "content": text}] if self.chat else text

    def read(self, answer: str) -> list[str]:
        """The first ``per_document`` queries of an answer: its lines without list marks and quotes.

        Blank lines, lines that end in a colon (``Here are three queries:``) and a model's thoughts are none.
        """
        lines = [_MARK.sub("", line).strip().strip(_QUOTES).strip() for line in without_thoughts(answer).splitlines()]
        return [line for line in lines if line and not line.endswith(":")][: self.per_document]
