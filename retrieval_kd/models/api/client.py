"""One OpenAI-compatible endpoint over HTTP: a request in, a reply out, with retries, and no way out for the key."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, NamedTuple, Self

from retrieval_kd.errors import InputError, MissingExtraError, RetrievalKDError
from retrieval_kd.models.api.reply import Reply, read_reply, without_key
from retrieval_kd.models.api.usage import Ledger, Tokens

log = logging.getLogger("retrieval_kd")

CHAT = "chat/completions"
TEXT = "completions"
_FOR_NOW = frozenset({408, 409, 425, 429})
"""Refusals of a client's request that may be granted later, as any 5xx."""
_OF_THIS_REQUEST = frozenset({400, 413, 422})
"""Refusals that may be due to this request's text: too long, or not to the endpoint's liking."""


class EndpointError(RetrievalKDError):
    """The endpoint refuses all requests, or failed again and again; finished answers are kept."""


class RefusedError(Exception):
    """The endpoint refused one request for good: held against its query and document, which are named."""


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
    """How long an attempt may take, how often to try again, and the longest wait before it."""

    timeout_s: float
    retries: int
    max_wait_s: float


def read_key(key_env: str | None, base_url: str) -> str | None:
    """The key in an environment variable. Raises `InputError` when it is not set, or holds what cannot be sent."""
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        name = key_env if key_env.isupper() else "that key_env names"  # somebody may give the key itself
        raise InputError(
            f"the environment variable {name} is not set; it holds the key for {base_url} "
            "(an endpoint without a key: --set key_env=null)"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the environment variable {key_env} holds characters that no key has; set it again")
    return key


class Client:
    """The way to one endpoint, for several threads.

    The key goes into the header ``Authorization`` and is taken out of every reply.
    """

    def __init__(self, base_url: str, key_env: str | None, retrying: Retrying, ledger: Ledger) -> None:
        self.base_url = base_url
        self.key_env = key_env
        self.key = read_key(key_env, base_url)
        self.retrying = retrying
        self.ledger = ledger
        self.stopping = threading.Event()
        """Set when the run ends: whoever waits for another attempt gives up."""
        self.sleep: Callable[[float], object] = self.stopping.wait
        self._refused: dict[str, str] = {}
        """Requests that were refused → what was said: they need not be sent again while a shard is halved."""

    @cached_property
    def _http(self) -> Any:
        try:
            import httpx2
            import tenacity  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"kind 'api' needs the package '{error.name}'", "api") from error
        try:
            httpx2.URL(self.base_url)
        except httpx2.InvalidURL as error:
            raise EndpointError(f"base_url: {self.base_url} cannot be used ({error})") from None
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        timeout = httpx2.Timeout(self.retrying.timeout_s, connect=min(10.0, self.retrying.timeout_s), pool=None)
        client = httpx2.Client(headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=None))
        weakref.finalize(self, client.close)
        return client

    def open(self) -> None:
        """Makes ready to send, before several threads do. Raises `EndpointError` when the URL cannot be used."""
        self.stopping.clear()
        _ = self._http

    def post(self, request: Request) -> Reply:
        """The reply to a request, after as many attempts as it takes.

        Raises `RefusedError` when this one was refused, `EndpointError` when any would be or the attempts are spent,
        `BudgetError` when it does not fit, `CancelledError` when the run ends before it is sent.
        """
        import tenacity

        if request.key in self._refused:
            raise RefusedError(f"{request.about}: {self._refused[request.key]}")

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
        if self.stopping.is_set():
            raise CancelledError
        worst = request.worst
        self.ledger.reserve(worst, retried=retried, stopping=self.stopping)
        used, estimated = worst, True  # what was sent and not answered may be charged
        try:
            reply = self._send(request)
            if reply.usage is not None:
                used, estimated = Tokens(*reply.usage), False
            return reply
        except (_NotTakenError, RefusedError, EndpointError):
            used, estimated = Tokens(0, 0), False
            raise
        finally:
            self.ledger.settle(worst, used, estimated=estimated)

    def _send(self, request: Request) -> Reply:
        import httpx2

        try:
            status, headers, text = self._received(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _NotTakenError(f"cannot be reached ({self._hidden(str(error))})") from None
        except httpx2.TimeoutException:
            raise _FailedError(f"no answer within {self.retrying.timeout_s:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _FailedError(f"the connection broke ({self._hidden(str(error))})") from None
        said = _start(self._hidden(text))
        if status in _FOR_NOW or status >= 500:
            raise _NotTakenError(f"answered {status}: {said}", _retry_after(headers.get("Retry-After")))
        if status in _OF_THIS_REQUEST:
            self._refused[request.key] = f"{self.base_url} answered {status}: {said}; {self._mend(status)}"
            raise RefusedError(f"{request.about}: {self._refused[request.key]}")
        if status != 200:
            raise EndpointError(f"{self.base_url}: answered {status} ({request.about}): {said}; {self._mend(status)}")
        try:
            return read_reply(self._hidden(json.loads(text)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise _FailedError(f"the reply is not a completion: {said}") from None

    def _received(self, request: Request) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and text of a response; a timeout when it still comes, bit by bit, after ``timeout_s``."""
        import httpx2

        end = time.monotonic() + self.retrying.timeout_s
        parts = []
        with self._http.stream("POST", f"{self.base_url}/{request.path}", json=request.body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("it still comes")
            return response.status_code, response.headers, b"".join(parts).decode(errors="replace")

    def _mend(self, status: int) -> str:
        if status in (401, 403):
            return "no key was sent, set key_env" if self.key is None else f"check the key in {self.key_env}"
        if status in (404, 405) or 300 <= status < 400:
            return "check base_url (it ends in /v1 most of the time) and model"
        return "if the text is too long, set max_passage_words; a field of the body is changed or left out by request:"

    def _hidden(self, value: Any) -> Any:
        return without_key(value, self.key)


class _FailedError(Exception):
    """An attempt that failed and may succeed later."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _NotTakenError(_FailedError):
    """An attempt of which the endpoint said that it did nothing, or that never reached it: it costs nothing."""


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
