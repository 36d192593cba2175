"""Questions and their outcomes: each answer from the cache or the endpoint, malformed ones asked for again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

from retrieval_kd.models.api.cache import AnswerCache
from retrieval_kd.models.api.client import Client, EndpointError, Request
from retrieval_kd.models.api.reply import Reply

T = TypeVar("T")


class Question(NamedTuple, Generic[T]):
    """A request, how its reply is read (None: malformed), and what a malformed reply is answered with."""

    request: Request
    read: Callable[[Reply], T | None]
    reminder: str | None = None
    """Without one, a malformed reply is not asked for again."""


class Outcome(NamedTuple, Generic[T]):
    """What came of a question: a value, or None when every reply was malformed."""

    value: T | None
    replies: list[Reply]
    cached: int

    @property
    def malformed(self) -> int:
        """The number of malformed replies."""
        return len(self.replies) - (self.value is not None)


def ask_all(
    questions: Sequence[Question[T]], client: Client, cache: AnswerCache, *, concurrency: int, attempts: int
) -> list[Outcome[T]]:
    """An outcome for each question, in their order; equal requests are sent once.

    An error is raised as soon as the requests in flight have their answers, which are kept; an interruption of the
    thread that waits here (Ctrl-C, a worker that is told to end) passes in the same way.
    Every reply is cached, the malformed ones too: a second time the same is read and counted, without a request.
    """
    client.open()
    failures: list[BaseException] = []

    def ask(question: Question[T]) -> Outcome[T]:
        if client.stopping.is_set():
            raise CancelledError
        try:
            return _ask(question, client, cache, attempts)
        except BaseException as error:
            failures.append(error)
            client.stopping.set()
            raise

    keys = [question.request.key for question in questions]
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="api")
    try:
        unique = dict(zip(keys, questions, strict=True))
        futures = {key: pool.submit(ask, question) for key, question in unique.items()}
        wait(futures.values(), return_when=FIRST_EXCEPTION)
        if failures:
            raise failures[0]  # the others may only have given up for it
        outcomes = {key: future.result() for key, future in futures.items()}
    finally:
        client.stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)
    models = {reply.model for outcome in outcomes.values() for reply in outcome.replies if reply.model}
    client.ledger.note(sum(outcome.cached for outcome in outcomes.values()), sorted(models))
    return [outcomes[key] for key in keys]


def _ask(question: Question[T], client: Client, cache: AnswerCache, attempts: int) -> Outcome[T]:
    request = question.request
    replies: list[Reply] = []
    cached = 0
    while True:
        reply = cache.get(request.key)
        if reply is None:
            reply = cache.put(request.key, _with_logprobs(request, client.post(request), client.base_url))
        else:
            cached += 1
        replies.append(reply)
        value = question.read(reply)
        if value is not None or question.reminder is None or len(replies) > attempts:
            return Outcome(value, replies, cached)
        request = request.reminded(reply.content, question.reminder)


def _with_logprobs(request: Request, reply: Reply, endpoint: str) -> Reply:
    """``reply``; not kept when the endpoint leaves out what was asked for, for another version may give it."""
    if request.body.get("logprobs") and reply.first_token is None and reply.content:
        raise EndpointError(
            f"{endpoint}: gives no log-probabilities, which a prompt with positive: and negative: needs "
            "(vLLM, llama.cpp, TGI and OpenAI do); use such an endpoint, or a prompt with grades: (prompts/graded)"
        )
    return reply
