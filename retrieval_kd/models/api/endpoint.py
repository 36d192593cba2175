"""The keys of a recipe that asks an endpoint, and what they make: requests, a client with its budget, a cache."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from retrieval_kd.artifact import InputRef
from retrieval_kd.data.sources import cache_directory
from retrieval_kd.models.api.cache import AnswerCache
from retrieval_kd.models.api.client import CHAT, TEXT, Client, Request, Retrying, read_key
from retrieval_kd.models.api.usage import Budget, Ledger, Price
from retrieval_kd.recipe import Section

_SET_ELSEWHERE = ("model", "messages", "prompt", "logprobs", "top_logprobs", "n", "best_of", "echo", "stream")
_LONGEST = ("max_tokens", "max_completion_tokens")

ENDPOINT_EXECUTION = frozenset(
    {
        "key_env",
        "concurrency",
        "timeout_s",
        "retries",
        "max_wait_s",
        "budget",
        "budget_tokens",
        "price_per_million",
        "cache",
    }
)
"""The keys that say how an endpoint is asked and cannot change an answer."""


class EndpointKeys(Section):
    """The keys of a recipe that asks a model behind an endpoint."""

    model_config = ConfigDict(hide_input_in_errors=True)  # somebody may put a key into the wrong place

    base_url: str
    """The endpoint up to and with its version: ``http://localhost:8000/v1``."""
    model: str
    key_env: str | None = "OPENAI_API_KEY"
    """The name of the environment variable that holds the key; null for an endpoint without one."""
    max_passage_words: int | None = Field(default=None, ge=1)
    """A document is cut to this many words."""
    malformed_attempts: int = Field(default=2, ge=0)
    """How often a malformed answer is asked for again, with a reminder of its form."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The longest answer; what suits the question when not given."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Other fields of the request's body, as they are; null leaves a field out (``temperature: null``)."""
    concurrency: int = Field(default=8, ge=1)
    """Requests in flight at the same time, for each process."""
    timeout_s: float = Field(default=120, gt=0)
    retries: int = Field(default=6, ge=0)
    max_wait_s: float = Field(default=60, ge=0)
    """The longest wait before another attempt, whatever ``Retry-After`` says."""
    budget: float | None = Field(default=None, ge=0)
    """The most that the run may cost, in the currency of ``price_per_million``, by an endpoint that keeps to
    ``max_tokens``."""
    budget_tokens: int | None = Field(default=None, ge=0)
    price_per_million: Price | None = None
    cache: str | None = None
    """The folder of finished answers; ``~/.cache/retrieval-kd/api`` (or ``$XDG_CACHE_HOME``) when not given."""

    @field_validator("base_url")
    @classmethod
    def _without_last_slash(cls, value: str) -> str:
        return value.rstrip("/")

    @model_validator(mode="after")
    def _nothing_secret(self) -> EndpointKeys:
        """Of the whole recipe, not of one field: the message about a field repeats its value."""
        if self.key_env is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env takes the name of an environment variable (OPENAI_API_KEY), never the key itself")
        parts = urlsplit(self.base_url)
        if "@" in self.base_url or parts.query or parts.fragment:
            raise ValueError(
                "base_url: no user, password or query in the URL: recipes are kept; the key goes where key_env says"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url: a URL such as http://localhost:8000/v1 is needed")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError("base_url: the port is not a number from 1 to 65535")
        return self

    @model_validator(mode="after")
    def _can_be_asked(self) -> EndpointKeys:
        if elsewhere := [key for key in _SET_ELSEWHERE if key in self.request]:
            raise ValueError(f"request: '{elsewhere[0]}' has no place here, the other keys decide it")
        for key in _LONGEST:
            value = self.request.get(key, 1)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"request: {key} takes a whole number from 1 (got {value!r})")
        try:
            json.dumps(self.request, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"request: a value that JSON does not have ({error})") from error
        if self.budget is not None and self.price_per_million is None:
            raise ValueError("budget needs price_per_million: {input: …, output: …}")
        endless = self.request.get("max_tokens", 1) is None and not self.request.get("max_completion_tokens")
        if endless and (self.budget is not None or self.budget_tokens is not None):
            raise ValueError("a budget needs a longest answer: max_tokens, or request: {max_completion_tokens: …}")
        return self

    def asked(
        self,
        rendered: str | list[dict[str, str]],
        about: str,
        *,
        answer_start: str = "",
        max_tokens: int,
        top_logprobs: int | None = None,
    ) -> Request:
        """The request for a rendered prompt: a chat for messages, a plain completion for text.

        ``max_tokens`` counts where the recipe does not say. Only a text can be given the start of its answer.
        """
        if isinstance(rendered, str):
            rendered += answer_start
        chat = not isinstance(rendered, str)
        body: dict[str, Any] = {"model": self.model, "messages" if chat else "prompt": rendered}
        body |= {"temperature": 0, "max_tokens": self.max_tokens or max_tokens}
        if top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": top_logprobs} if chat else {"logprobs": top_logprobs}
        body = {key: value for key, value in (body | self.request).items() if value is not None}
        return Request(CHAT if chat else TEXT, body, about)

    def model_ref(self) -> InputRef:
        """The model at its endpoint, by name: its weights cannot be seen."""
        name = f"{self.model}@{self.base_url}"
        return InputRef(hashlib.sha256(name.encode()).hexdigest(), name=name)

    def open_client(self, work: Path | None) -> Client:
        """The endpoint; what is used of it is recorded in ``work``, which resumes share, or in memory only."""
        read_key(self.key_env, self.base_url)  # an error comes before the record of usage is written
        budget = Budget(self.budget, self.budget_tokens, self.price_per_million)
        path = ":memory:" if work is None else work / "usage.sqlite"
        ledger = Ledger(path, budget, patience_s=self.timeout_s * (self.retries + 1))
        return Client(self.base_url, self.key_env, Retrying(self.timeout_s, self.retries, self.max_wait_s), ledger)

    def open_cache(self) -> AnswerCache:
        """The answers of this endpoint and model, shared by all that ask it."""
        folder = Path(self.cache) if self.cache else cache_directory().parent / "api"
        return AnswerCache(folder / f"{self.model_ref().fingerprint[:16]}.sqlite")


def cut_words(text: str, most_words: int | None) -> tuple[str, int]:
    """A text's first words, and how many were left out."""
    words = text.split()
    if most_words is None or len(words) <= most_words:
        return text, 0
    return " ".join(words[:most_words]), len(words) - most_words
