"""The recipe of the API teacher, and the requests that it and its prompt make."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from retrieval_kd.errors import RecipeError
from retrieval_kd.teachers.api.client import CHAT, TEXT, Request
from retrieval_kd.teachers.api.usage import Price
from retrieval_kd.teachers.prompts import Prompt, PromptedRecipe
from retrieval_kd.teachers.windows import WindowKeys

_SET_ELSEWHERE = ("model", "messages", "prompt", "logprobs", "top_logprobs", "n", "best_of", "echo", "stream")
_LONGEST = ("max_tokens", "max_completion_tokens")


class ApiRecipe(PromptedRecipe, WindowKeys):
    """Keys of ``kind: api``. The prompt decides what is asked for: log-odds of two answers, a grade, or an order."""

    model_config = ConfigDict(hide_input_in_errors=True)  # somebody may put a key into the wrong place

    execution: ClassVar[frozenset[str]] = frozenset(
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

    kind: Literal["api"]
    base_url: str
    """The endpoint up to and with its version: ``http://localhost:8000/v1``."""
    model: str
    key_env: str | None = "OPENAI_API_KEY"
    """The name of the environment variable that holds the key; null for an endpoint without one."""
    top_logprobs: int = Field(default=20, ge=2)
    max_passage_words: int | None = Field(default=None, ge=1)
    """A document is cut to this many words; to the prompt's ``passage_words`` when not given."""
    malformed_attempts: int = Field(default=2, ge=0)
    """How often a malformed grade or order is asked for again, with a reminder of its form."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The longest answer: 1 for log-odds, 16 for a grade, 8 for each passage and 8 more when not given."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Other fields of the request's body, as they are; null leaves a field out (``temperature: null``)."""
    pairs_per_shard: int = Field(default=1024, ge=1)
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
    def _nothing_secret(self) -> ApiRecipe:
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
    def _can_be_asked(self) -> ApiRecipe:
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

    def fits(self, prompt: Prompt) -> None:
        """Raises `RecipeError` when the prompt cannot be asked in this way."""
        if prompt.kind == "pointwise":
            for key, field in WindowKeys.model_fields.items():
                if getattr(self, key) != field.default:
                    raise RecipeError(f"{key}: the prompt '{self.prompt}' is pointwise, and has no windows")
        elif prompt.most_passages is not None and self.window > prompt.most_passages:
            raise RecipeError(
                f"window: {self.window} passages, but the prompt '{self.prompt}' has {prompt.most_passages} identifiers"
            )
        if prompt.answer_start and prompt.messages is not None:
            raise RecipeError(
                f"prompt '{self.prompt}': an endpoint cannot be made to begin a chat answer with answer_start; "
                "use a prompt with text:, or one without answer_start:"
            )
        if self.instruction is not None and not prompt.takes_instruction:
            raise RecipeError(f"prompt '{self.prompt}' has no {{instruction}}; leave the recipe's instruction: out")

    def asked(
        self,
        rendered: str | list[dict[str, str]],
        about: str,
        *,
        answer_start: str,
        max_tokens: int,
        logprobs: bool = False,
    ) -> Request:
        """The request for a rendered prompt: a chat for messages, a plain completion for text.

        ``max_tokens`` counts where the recipe does not say. Only a text can be given the start of its answer.
        """
        if isinstance(rendered, str):
            rendered += answer_start
        chat = not isinstance(rendered, str)
        body: dict[str, Any] = {"model": self.model, "messages" if chat else "prompt": rendered}
        body |= {"temperature": 0, "max_tokens": self.max_tokens or max_tokens}
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs} if chat else {"logprobs": self.top_logprobs}
        body = {key: value for key, value in (body | self.request).items() if value is not None}
        return Request(CHAT if chat else TEXT, body, about)
