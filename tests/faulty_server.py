"""A local endpoint that fails as it is told to: one behaviour a request, in order, then good answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler"], None]


class FaultyServer(ThreadingHTTPServer):
    """Records every request: ``requests`` are (path, body, headers)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"
        self.behaviours: list[Behaviour] = []
        self.content: Callable[[dict[str, Any]], str] = lambda body: "2"
        self.usage: tuple[int, int] | None = (10, 1)
        self.delay = 0.0
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.in_flight = self.most_in_flight = 0
        self.ended = threading.Event()
        self.lock = threading.Lock()

    def good(self, body: dict[str, Any]) -> dict[str, Any]:
        """A completion in the form of OpenAI's."""
        message = {"role": "assistant", "content": self.content(body)}
        reply: dict[str, Any] = {"model": "tiny-2026", "choices": [{"index": 0, "message": message}]}
        if "prompt" in body:
            reply["choices"] = [{"index": 0, "text": message["content"]}]
        if self.usage is not None:
            reply["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), self.usage, strict=True))
        return reply


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.body, dict(self.headers)))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.in_flight, self.server.most_in_flight)
            behaviour = self.server.behaviours.pop(0) if self.server.behaviours else good
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.in_flight -= 1
        behaviour(self)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def good(handler: Handler) -> None:
    handler.reply(200, json.dumps(handler.server.good(handler.body)).encode())


def saying(raw: dict[str, Any]) -> Behaviour:
    """A 200 with this JSON."""
    return lambda handler: handler.reply(200, json.dumps(raw).encode())


def status(code: int, body: str = "", headers: dict[str, str] | None = None) -> Behaviour:
    return lambda handler: handler.reply(code, body.encode(), headers)


def echo(handler: Handler) -> None:
    """A refusal that repeats the request's headers, the key among them."""
    handler.reply(401, json.dumps(dict(handler.headers)).encode())


def half(handler: Handler) -> None:
    """Promises more than it sends, and hangs up."""
    body = json.dumps(handler.server.good(handler.body)).encode()
    handler.reply(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
    handler.close_connection = True


def hang(handler: Handler) -> None:
    """Says nothing until the test is over."""
    handler.server.ended.wait(10)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """A 200 that takes 5 s to say nothing: a space now and then, as some proxies send to keep a connection alive."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.close_connection = True
    for _ in range(100):
        try:
            handler.wfile.write(b" ")
        except OSError:  # the client hung up
            return
        if handler.server.ended.wait(0.05):
            return


@contextmanager
def running() -> Iterator[FaultyServer]:
    """A server on a free port of this machine."""
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
