"""One OpenAI-compatible endpoint over HTTP: a request in, a reply out, with retries, and no way out for the key."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, NamedTuple, Self

from retrieval_kd.errors import InputError, MissingExtraError, RetrievalKDError
from retrieval_kd.teachers.api.answers import Reply
from retrieval_kd.teachers.api.usage import Ledger, Tokens

log = logging.getLogger("retrieval_kd")

CHAT = "chat/completions"
TEXT = "completions"
_FOR_NOW = frozenset({408, 409, 425, 429})
"""Refusals of a client's request that may be granted later, as any 5xx."""
_SECRET = 8
"""A shorter key (``EMPTY`` for a server of one's own) is no secret, and may be part of any text."""


class EndpointError(RetrievalKDError):
    """The endpoint refused a request for good, or failed again and again; finished answers are kept."""


class Request(NamedTuple):
    """A request and the pair or window it is about."""

    path: str
    body: Mapping[str, Any]
    about: str

    @property
    def key(self) -> str:
        """SHA-256 of all that can change the answer."""
        return hashlib.sha256(json.dumps([self.path, self.body], sort_keys=True).encode()).hexdigest()

    @property
    def worst(self) -> Tokens:
        """The most tokens it can take: one for each byte, some for the chat template, and the longest answer."""
        texts = [turn["content"] for turn in self.body["messages"]] if self.path == CHAT else [self.body["prompt"]]
        prompt = 64 + sum(len(text.encode()) + 16 for text in texts)
        return Tokens(prompt, max(int(self.body.get(key) or 0) for key in ("max_tokens", "max_completion_tokens")))

    def reminded(self, answer: str, reminder: str) -> Self:
        """The request that follows a malformed answer: the answer itself and a reminder of the form."""
        if self.path == CHAT:
            turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": reminder}]
            return self._replace(body={**self.body, "messages": [*self.body["messages"], *turns]})
        return self._replace(body={**self.body, "prompt": f"{self.body['prompt']}{answer}\n\n{reminder}\n"})


class Retrying(NamedTuple):
    """How long to wait and how often to try again."""

    timeout_s: float
    retries: int
    max_wait_s: float


class Client:
    """The way to one endpoint, for several threads.

    The key is read from the environment, goes into the header ``Authorization`` and is taken out of every reply.
    """

    def __init__(self, base_url: str, key_env: str | None, retrying: Retrying, ledger: Ledger) -> None:
        self.base_url = base_url
        self.key_env = key_env
        self.retrying = retrying
        self.ledger = ledger
        self.stopping = threading.Event()
        """Set when the run ends: whoever waits for another attempt gives up."""
        self.sleep: Callable[[float], object] = self.stopping.wait

    @cached_property
    def key(self) -> str | None:
        """The key. Raises `InputError` when its variable is not set, or cannot be sent."""
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise InputError(
                f"the environment variable {self.key_env} is not set; it holds the key for {self.base_url} "
                "(an endpoint without a key: --set key_env=null)"
            )
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the environment variable {self.key_env} holds characters that no key has; set it again")
        return key

    @cached_property
    def _http(self) -> Any:
        try:
            import httpx2
            import tenacity  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"kind 'api' needs the package '{error.name}'", "api") from error
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        timeout = httpx2.Timeout(self.retrying.timeout_s, connect=min(10.0, self.retrying.timeout_s), pool=None)
        client = httpx2.Client(headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=None))
        weakref.finalize(self, client.close)
        return client

    def open(self) -> None:
        """Makes ready to send, before several threads do."""
        self.stopping.clear()
        _ = self._http

    def post(self, request: Request) -> Reply:
        """The reply to a request, after as many attempts as it takes.

        Raises `EndpointError` when it was refused or the attempts are spent, `BudgetError` when it does not fit.
        """
        import tenacity

        def wait(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception()
            if failure.retry_after is not None:
                return min(float(failure.retry_after), self.retrying.max_wait_s)
            return float(tenacity.wait_exponential_jitter(max=self.retrying.max_wait_s)(state))

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_FailedError),
            stop=tenacity.stop_after_attempt(1 + self.retrying.retries) | tenacity.stop_when_event_set(self.stopping),
            wait=wait,
            sleep=self.sleep,
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            for attempt in attempts:
                with attempt:
                    return self._attempt(request, retried=attempt.retry_state.attempt_number > 1)
        except _FailedError as failure:
            raise EndpointError(
                f"{self.base_url}: {failure} ({request.about}), after {1 + self.retrying.retries} attempts; finished "
                "answers are kept: run the same command again when the endpoint is well "
                "(--set retries=…, timeout_s=… or concurrency=… change how it is asked)"
            ) from None
        raise AssertionError("unreachable: attempts end in a reply or an error")

    def _attempt(self, request: Request, *, retried: bool) -> Reply:
        worst = request.worst
        self.ledger.reserve(worst, retried=retried)
        used, estimated = worst, True  # what was sent and not answered may be charged
        try:
            reply = self._send(request)
            if reply.usage is not None:
                used, estimated = Tokens(*reply.usage), False
            return reply
        except (_NotTakenError, EndpointError):
            used, estimated = Tokens(0, 0), False
            raise
        finally:
            self.ledger.settle(worst, used, estimated=estimated)

    def _send(self, request: Request) -> Reply:
        import httpx2

        try:
            response = self._http.post(f"{self.base_url}/{request.path}", json=request.body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _NotTakenError(f"cannot be reached ({error})") from None
        except httpx2.TimeoutException:
            raise _FailedError(f"no answer within {self.retrying.timeout_s:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _FailedError(f"the connection broke ({error})") from None
        body = self._without_key(response.text)
        status = response.status_code
        if status in _FOR_NOW or status >= 500:
            raise _NotTakenError(
                f"answered {status}: {_start(body)}", _retry_after(response.headers.get("Retry-After"))
            )
        if status != 200:
            raise EndpointError(
                f"{self.base_url}: answered {status} ({request.about}): {_start(body)}; {self._mend(status)}"
            )
        try:
            return _read(json.loads(body))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise _FailedError(f"the reply is not a completion: {_start(body)}") from None

    def _mend(self, status: int) -> str:
        if status in (401, 403):
            return "no key was sent, set key_env" if self.key_env is None else f"check the key in {self.key_env}"
        if status in (404, 405) or 300 <= status < 400:
            return "check base_url (it ends in /v1 most of the time) and model"
        return "if the text is too long, set max_passage_words; a field of the body is changed or left out by request:"

    def _without_key(self, text: str) -> str:
        if self.key is None or len(self.key) < _SECRET:
            return text
        return text.replace(self.key, "[key]").replace(json.dumps(self.key)[1:-1], "[key]")


class _FailedError(Exception):
    """An attempt that failed and may succeed later."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _NotTakenError(_FailedError):
    """An attempt of which the endpoint said that it did nothing, or that never reached it: it costs nothing."""


def _read(raw: Any) -> Reply:
    """The reply in a response's JSON; any error of access means that it is not one."""
    choice = raw["choices"][0]
    content = choice["message"].get("content") if "message" in choice else choice["text"]
    if not isinstance(content, str | None):
        raise TypeError("content")
    usage = raw.get("usage") or {}
    counted: tuple[Any, Any] = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return Reply(
        content=content or "",
        first_token=_first_token(choice.get("logprobs")),
        usage=None if None in counted else (int(counted[0]), int(counted[1])),
        model=raw.get("model"),
    )


def _first_token(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    """The first token's alternatives: in the form of chats (``content``), or the older one of plain completions."""
    if not logprobs:
        return None
    if logprobs.get("content"):
        first = logprobs["content"][0]
        found = [(item["token"], float(item["logprob"])) for item in first.get("top_logprobs") or []]
        chosen = (first["token"], float(first["logprob"]))
    elif logprobs.get("tokens"):
        found = [(token, float(value)) for token, value in ((logprobs.get("top_logprobs") or [{}])[0] or {}).items()]
        chosen = (logprobs["tokens"][0], float(logprobs["token_logprobs"][0]))
    else:
        return ()
    if any(math.isnan(value) for _, value in [*found, chosen]):
        raise ValueError("a log-probability is NaN")
    return tuple(found) if chosen[0] in dict(found) else (*found, chosen)


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number of seconds or a date; None when there is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _start(body: str) -> str:
    text = " ".join(body.split())
    return (text[:300] + "…" if len(text) > 300 else text) or "(an empty body)"


def _log_retry(state: Any) -> None:
    log.info(
        "%s; attempt %d follows in %.1f s", state.outcome.exception(), state.attempt_number + 1, state.next_action.sleep
    )
