"""Seconds a query of the two decodings of a listwise teacher: the whole permutation, or the first token alone.

Run: python benchmarks/listwise_decoding.py [--collection pydocs] [--queries 4] [--out FILE.json]
Both read the same prompts (FIRST, 20 passages named A to T) with the same language model. Its weights are random, which
changes no time; its tokenizer is trained on the collection.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.sources import open_collection
from retrieval_kd.eval.efficiency import machine
from retrieval_kd.models.encoder import quiet_loading
from retrieval_kd.software import software_versions
from retrieval_kd.teachers.base import Candidates
from retrieval_kd.teachers.llm_listwise import LLMListwiseTeacher

DECODINGS = ("permutation", "first-token")
DEPTHS = (20, 40)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_model(folder: Path, collection: Collection, layers: int, width: int, vocabulary: int) -> int:
    """The number of parameters of a Qwen3 with random weights, which is written to ``folder`` with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(collection.documents.iter_texts(0, 3000), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = CHAT
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(fast),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    with quiet_loading():
        network.save_pretrained(folder)
        fast.save_pretrained(folder)
    return int(network.num_parameters())


def make_teacher(model: Path, decoding: str, words: int) -> LLMListwiseTeacher:
    """A teacher with the prompt of FIRST, passages cut to ``words`` words."""
    recipe = LLMListwiseTeacher.Recipe(
        kind="llm-listwise", model=str(model), prompt="first", decoding=decoding, max_length=8192
    )
    teacher = LLMListwiseTeacher(recipe)
    teacher.prompt = teacher.prompt.model_copy(update={"passage_words": words})
    return teacher


def measure(teachers: dict[str, LLMListwiseTeacher], shard: list[Candidates], texts: list[list[str]]) -> dict[str, Any]:
    """Seconds a query of each decoding, queries one at a time and all in one shard.

    Asserts that both rank the same windows.
    """
    for teacher in teachers.values():
        teacher.counts.clear()
    one: dict[str, float] = dict.fromkeys(teachers, 0.0)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in teachers}
    for query, of_query in zip(shard, texts, strict=True):
        for name, teacher in teachers.items():
            begun = time.perf_counter()
            scores[name] += teacher.score([query], [of_query]).scores
            one[name] += time.perf_counter() - begun
    together = {}
    for name, teacher in teachers.items():
        begun = time.perf_counter()
        teacher.score(shard, texts)
        together[name] = time.perf_counter() - begun
    for permutation, first in zip(*scores.values(), strict=True):
        assert sorted(permutation) == sorted(first) == list(range(-len(first), 0))
        if len(first) <= 20:  # of one window both begin with the identifier of the highest logit
            assert permutation.argmax() == first.argmax()
    windows = {name: teacher.counts["windows"] for name, teacher in teachers.items()}
    assert len(set(windows.values())) == 1, windows
    return {
        "windows_per_query": windows["first-token"] / len(shard) / 2,
        "one_at_a_time": {name: seconds / len(shard) for name, seconds in one.items()},
        "all_together": {name: seconds / len(shard) for name, seconds in together.items()},
    }


def main() -> None:
    """Prints a table; ``--out`` keeps the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="pydocs", help="pydocs, a BEIR folder or a collection")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--words", type=int, nargs="+", default=[60, 300], help="a passage is cut to so many words")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    collection = open_collection(arguments.collection)
    queries = list(collection.queries("all").items())[: arguments.queries]
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        parameters = make_model(model, collection, arguments.layers, arguments.width, arguments.vocabulary)
        for words in arguments.words:
            teachers = {decoding: make_teacher(model, decoding, words) for decoding in DECODINGS}
            permutation, first = (teachers[name] for name in DECODINGS)
            assert [tokens[0] for tokens in permutation._first] == first._identifier_tokens  # the same identifiers
            for depth in DEPTHS:
                shard = [
                    Candidates(query_id, text, rng.choice(len(collection.documents), depth, replace=False))
                    for query_id, text in queries
                ]
                texts = [collection.documents.texts(query.rows.tolist()) for query in shard]
                cut = [[" ".join(text.split()[:words]) for text in of_query[:20]] for of_query in texts]
                prompts = [first.prompt.listwise(query.text, of) for query, of in zip(shard, cut, strict=True)]
                length = float(np.mean([len(ids) for ids in first.model.tokenize(prompts)]))
                found = measure(teachers, shard, texts)
                rows.append({"words": words, "candidates": depth, "prompt_tokens": length, **found})
                show(rows[-1])
    report = {
        "collection": arguments.collection,
        "queries": len(queries),
        "layers": arguments.layers,
        "width": arguments.width,
        "parameters": parameters,
        "answer_tokens": permutation._answer_tokens,
        "threads": torch.get_num_threads(),
        "device": str(first.model.network.device),
        "dtype": first.model.dtype,
        "rows": rows,
        "machine": machine(),
        "software": software_versions(),
    }
    print(json.dumps({key: value for key, value in report.items() if key not in ("rows", "software")}))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(row: dict[str, Any]) -> None:
    """Prints two lines of the table: queries one at a time, and all in one shard."""
    for how in ("one_at_a_time", "all_together"):
        permutation, first = (row[how][name] for name in DECODINGS)
        print(
            f"{row['words']:4d} words, {row['candidates']} candidates (windows: {row['windows_per_query']:.0f} of "
            f"{row['prompt_tokens']:.0f} tokens), {how.replace('_', ' '):13s}: permutation {permutation:6.2f} s, "
            f"first token {first:6.2f} s a query, {permutation / first:4.1f} times faster"
        )


if __name__ == "__main__":
    main()
