"""Tiny chat models, one of which gives answers that can be told in advance, and the servers that answer with them."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_tokenizer(words: list[str]) -> Any:
    """Words between white space; the chat is its turns' contents one after another, so the last word comes last."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(words: int, size: int, **changes: Any) -> Any:
    """A Llama of one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=size,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=1,
            **changes,
        )
    )


def make_parrot(folder: Path, follows: Mapping[str, str]) -> Path:
    """A model that only looks at the last word and says the one that ``follows`` it, or else ends."""
    import torch

    words = sorted({*follows, *follows.values()})
    tokenizer = make_tokenizer(words)
    n = len(words) + 2
    model = make_model(n, n + n % 2)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "layers" in name and "norm" not in name:
                weights.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(n, n + n % 2))
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = 1
        for word, next_word in follows.items():
            row, column = tokenizer.convert_tokens_to_ids([next_word, word])
            model.lm_head.weight[row, column] = 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_random(folder: Path, words: list[str]) -> Path:
    """A random model whose next word depends on all that was said."""
    import torch

    torch.manual_seed(0)
    make_model(len(words) + 2, 16, initializer_range=0.5).save_pretrained(folder)
    make_tokenizer(words).save_pretrained(folder)
    return folder


def next_logits(model: Any, tokenizer: Any, text: str) -> Any:
    """Logits [words] float32 of the word after ``text``."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].float()


def app(folder: Path) -> Any:
    """An endpoint with the log-probabilities of a model's first token, in both of OpenAI's forms."""
    from fastapi import FastAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    server = FastAPI()

    def best(text: str, n: int) -> list[tuple[str, float]]:
        values, ids = next_logits(model, tokenizer, text).log_softmax(-1).topk(n)
        return list(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), values.tolist(), strict=True))

    @server.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False)
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in best(text, body["top_logprobs"])]
        first = {**top[0], "top_logprobs": top}
        message = {"role": "assistant", "content": top[0]["token"]}
        return {"model": "tiny", "choices": [{"index": 0, "message": message, "logprobs": {"content": [first]}}]}

    @server.post("/v1/completions")
    def completion(body: dict[str, Any]) -> dict[str, Any]:
        top = best(body["prompt"], body["logprobs"])
        first = {"tokens": [top[0][0]], "token_logprobs": [top[0][1]], "top_logprobs": [dict(top)]}
        return {"model": "tiny", "choices": [{"index": 0, "text": top[0][0], "logprobs": first}]}

    return server


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The base URL of `app`, run by uvicorn in a thread."""
    import uvicorn

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app(folder), host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        _wait_for(f"http://127.0.0.1:{port}/openapi.json", 30, thread.is_alive)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    """The base URL of ``transformers serve`` with one model; its output goes to ``log``."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", 120, lambda: process.poll() is None)
            yield f"http://127.0.0.1:{port}/v1"
        except TimeoutError as error:
            raise TimeoutError(f"{error}; its output ends in: {log.read_text()[-2000:]}") from error
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(url: str, seconds: float, alive: Any) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and alive():
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise TimeoutError(f"no server at {url} within {seconds} s")
