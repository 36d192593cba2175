from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_language_models as lm
import tiny_listwise
import torch

from retrieval_kd.data.collection import Collection
from retrieval_kd.data.run import Run
from retrieval_kd.errors import InputError, RecipeError, RetrievalKDError, UsageError
from retrieval_kd.models.load import Model
from retrieval_kd.recipe import load_recipe, validate
from retrieval_kd.students.development import PoolEvaluator
from retrieval_kd.students.inputs import TrainingInputs
from retrieval_kd.students.listwise_trainer import ListwiseObjective
from retrieval_kd.students.listwise_windows import WindowMaker, with_an_order
from retrieval_kd.students.llm_listwise import ListwiseStudent
from retrieval_kd.students.train import train
from retrieval_kd.teachers.base import Candidates
from retrieval_kd.teachers.llm_listwise import LLMListwiseTeacher
from retrieval_kd.teachers.score import score

Trained = Callable[..., Model]


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return lm.make_causal(shared / "listwise-base")


@pytest.fixture(scope="module")
def prompt(shared: Path) -> str:
    return tiny.write_recipe(shared / "listwise-prompt.yaml", tiny_listwise.PROMPT)


@pytest.fixture(scope="module")
def ranks(shared: Path, collection: Collection) -> Path:
    return tiny_listwise.make_scores(shared / "listwise-scores", collection)


@pytest.fixture
def student(base: Path, prompt: str) -> Callable[..., ListwiseStudent]:
    def make(**values: Any) -> ListwiseStudent:
        return ListwiseStudent(validate(ListwiseStudent.Recipe, {**defaults(base, prompt), **values}, "recipe"))

    return make


@pytest.fixture
def fit_listwise(base: Path, prompt: str, ranks: Path, collection: Collection, tmp_path: Path) -> Trained:
    numbers = itertools.count()

    def run(*, out: Path | None = None, inputs: dict[str, Any] | None = None, **values: Any) -> Model:
        recipe = tiny.write_recipe(tmp_path / "student.yaml", {**defaults(base, prompt), **values})
        given = {"collection": collection, "scores": [ranks], **(inputs or {})}
        return train(recipe, out=out or tmp_path / f"listwise-{next(numbers)}", **given)

    return run


def defaults(base: Path, prompt: str) -> dict[str, Any]:
    return {
        "kind": "llm-listwise",
        "base": str(base),
        "prompt": prompt,
        "max_length": 64,
        "groups": {"documents": 3},
        "steps": 4,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "development": {"against": "nothing"},
    }


def windows_of(student: ListwiseStudent, collection: Collection, scores: Path, *more: Any) -> WindowMaker:
    inputs = TrainingInputs(collection, student.recipe, [scores], *more)
    return student._windows(inputs, with_an_order(inputs.queries().queries)[0])


def teacher(model: Path, prompt: str, **values: Any) -> LLMListwiseTeacher:
    keys = {"kind": "llm-listwise", "model": str(model), "prompt": prompt, "decoding": "first-token", **values}
    return LLMListwiseTeacher(validate(LLMListwiseTeacher.Recipe, {"max_length": 64, **keys}, "recipe"))


def kendall_tau(order: list[int]) -> float:
    """Of rows in this order, against the teacher's."""
    places = [tiny_listwise.ORDER.index(row) for row in order]
    return float(np.mean([np.sign(b - a) for a, b in itertools.combinations(places, 2)]))


def test_it_ranks_as_its_teacher(
    fit_listwise: Trained, base: Path, prompt: str, collection: Collection, tmp_path: Path
) -> None:
    """Asked as any listwise teacher is: the order of 30 windows of d00 to d04 was random and becomes the teacher's."""
    order = [row for row in tiny_listwise.ORDER if row < 5]
    queries = list(collection.queries("train"))
    ranks = [-float(order.index(row)) for row in range(5)]
    five = dict.fromkeys(queries, ranks)
    scores = tiny_listwise.make_scores(tmp_path / "scores", collection, five)
    model = fit_listwise(
        inputs={"scores": [scores]},
        steps=100,
        batch_size=16,
        learning_rate=2e-2,
        warmup=0.2,
        lm_weight=0.2,
    )
    rng = np.random.default_rng(0)
    hits = [rng.permutation(tiny.ids_of([0, *rng.choice([1, 2, 3, 4], size=2, replace=False)])) for _ in queries]
    Run.from_hits(queries, hits, [np.arange(3, 0, -1)] * 30).save(tmp_path / "run", recipe={"kind": "made"}, inputs={})
    tau = {}
    for name in (base, model.path):
        keys = {"kind": "llm-listwise", "model": str(name), "prompt": prompt, "decoding": "first-token"}
        recipe = tiny.write_recipe(tmp_path / "teacher.yaml", {**keys, "max_length": 64, "window": 3, "stride": 1})
        found = score(recipe, collection=collection, candidates=[tmp_path / "run"], out=tmp_path / f"by-{name.name}")
        orders = [[int(row.doc_ids[i][1:]) for i in np.argsort(-row.scores)] for row in found]
        tau[name] = np.mean([kendall_tau(order) for order in orders])
    assert abs(tau[base]) < 0.2 and tau[model.path] > 0.8
    log = tiny.losses(model.path)
    assert np.mean(log[-5:]) < log[0] / 2
    rows = [row for row in tiny.log_rows(model.path) if row["loss"]]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["lm"]) + float(row["ranknet"]), abs=2e-3)
    assert (len(rows), model.manifest.counts["queries"]) == (100, 30)


def test_stock_transformers_loads_it(
    fit_listwise: Trained, student: Callable[..., ListwiseStudent], prompt: str, collection: Collection
) -> None:
    """The logits of its identifiers are those that the development evaluation reads; the chat template stays."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = fit_listwise(steps=2)
    stock = AutoModelForCausalLM.from_pretrained(model.path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    ids = tokenizer("query : w1\n[A] w3\n[B] w0\n[C] w5\nrank[")["input_ids"]
    expected = lm.next_logits(stock, ids)[tokenizer.convert_tokens_to_ids(["A", "B", "C"])]
    mine = student(base=str(model.path))
    found = mine.pool_scores(mine.language_model.network, ["w1"], collection.documents, np.array([3, 0, 5]))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert tokenizer.chat_template == lm.CHAT and stock.generation_config.eos_token_id == 2
    keys = ("kind", "window", "prompt", "max_length")
    assert {key: model.settings[key] for key in keys} == {
        "kind": "llm-listwise",
        "window": 3,
        "prompt": prompt,
        "max_length": 64,
    }
    card = (model.path / "README.md").read_text()
    assert f"`retrieval-kd score teachers/first --set model=MODEL --set prompt={prompt}` ranks with it." in card
    assert "`AutoModelForCausalLM` of transformers" in card and "learnt to write the order out (weight 1)" in card
    assert model.problems() == []


@pytest.mark.parametrize("cut", [0, 30])
def test_prompts_are_the_teachers(
    cut: int, student: Callable[..., ListwiseStudent], collection: Collection, ranks: Path, tmp_path: Path
) -> None:
    """The shipped prompt in a chat template, read by bytes: token for token, also where passages are cut."""
    base = lm.make_causal(tmp_path / "bytes", lm.byte_tokenizer(), length=4096)
    made = student(base=str(base), prompt="first", max_length=4000, groups={"documents": 8})
    maker = windows_of(made, collection, ranks)
    maker.max_length = max_length = len(maker.fitted([maker.window(3, 0)]).tokens[0]) - cut
    batch = maker([{"query": 3, "visit": 0}, {"query": 4, "visit": 7}])
    asked = teacher(base, "first", max_length=max_length, window=8, stride=4)
    for i, (list_, visit) in enumerate([(3, 0), (4, 7)]):
        window = maker.window(list_, visit)
        rows = window.rows[window.shown]
        candidates = Candidates(window.query.query_id, window.query.text, rows)
        with lm.asked(asked.model) as prompts:
            lost = asked.score([candidates], [collection.documents.texts(rows)]).tokens_lost[0]
        (expected,) = prompts
        assert batch["input_ids"][i, : batch["positions"][i, 0] + 1].tolist() == expected
        assert len(expected) <= max_length and maker.fitted([window]).tokens_lost[0].tolist() == lost.tolist()
        assert (lost > 0).any() == (cut > 0)


def test_windows_and_answers(student: Callable[..., ListwiseStudent], collection: Collection, ranks: Path) -> None:
    """Best first are the teacher's best and two others in its order; the answer names the places they are shown at."""
    maker = windows_of(student(), collection, ranks)
    tokenizer = maker.prompts.model.tokenizer
    shown = set()
    for visit in range(20):
        window = maker.window(2, visit)
        rows = window.rows.tolist()
        assert rows == sorted(rows, key=tiny_listwise.ORDER.index) and rows[0] == 5 and len(set(rows)) == 3
        shown.add(tuple(window.shown.tolist()))
        batch = maker([{"query": 2, "visit": visit}])
        letters = ["ABC"[window.shown.tolist().index(place)] for place in range(3)]
        text = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
        lines = [token for k in range(3) for token in f"[ {'ABC'[k]} ] w{window.rows[window.shown[k]]}".split()]
        answer = f"{letters[0]} ] > [ {letters[1]} ] > [ {letters[2]} ]".split()
        assert text == ["<s>", "query", ":", "w2", "w42", *lines, "rank", "[", *answer]
        targets = tokenizer.convert_ids_to_tokens(batch["targets"][0])
        assert targets == [*answer, "</s>"]
        assert batch["positions"][0].tolist() == list(range(len(text) - len(answer) - 1, len(text)))
        assert tokenizer.convert_ids_to_tokens(batch["identifiers"][0]) == letters
    assert len(shown) == 6
    again = windows_of(student(), collection, ranks)
    assert (again.window(2, 9).shown == maker.window(2, 9).shown).all()


def test_an_identifier_is_never_joined_with_what_follows(
    student: Callable[..., ListwiseStudent], tmp_path: Path
) -> None:
    """A tokenizer that has ``C]`` as one token: an answer begins with ``C``, whose logit ranks a window."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = lm.byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=lm.SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"{name}]" for name in "ABC"] * 9, trainer)
    made = student(base=str(lm.make_causal(tmp_path / "bytes", tokenizer)))
    tokens = made.prompts.answer(["C", "A", "B"])
    names = made.language_model.tokenizer.convert_ids_to_tokens(tokens)
    assert names == ["C", "]", "Ġ", ">", "Ġ", "[", "A]", "Ġ", ">", "Ġ", "[", "B]", "</s>"]
    assert tokens[0] == made.identifier_tokens[2]


def test_the_order_of_a_run(student: Callable[..., ListwiseStudent], collection: Collection, ranks: Path) -> None:
    """Without shuffling passages are shown as the run has them, what it lacks last; only scored ones are drawn."""
    queries = list(collection.queries("train"))
    run = Run.from_hits(queries, [["d30", "d02", "d05", "d07"]] * 30, [np.arange(4, 0, -1)] * 30)
    made = student(shuffle=False, groups={"documents": 8})
    inputs = TrainingInputs(collection, made.recipe, [ranks])
    inputs.candidates = run
    window = made._windows(inputs, with_an_order(inputs.queries().queries)[0]).window(0, 0)
    assert window.rows.tolist() == tiny_listwise.ORDER
    assert window.rows[window.shown].tolist() == [2, 5, 7, 0, 1, 3, 4, 6]
    with pytest.raises(UsageError, match="shuffle: false shows passages in the order of a run: give --candidates"):
        made.fit(TrainingInputs(collection, made.recipe, [ranks]), None)  # type: ignore[arg-type]


def plain_losses(student: ListwiseStudent, maker: WindowMaker, visits: list[dict[str, int]]) -> tuple[float, float]:
    """Window by window, token by token and pair by pair."""
    network, tokenizer = lm.plain(Path(student.recipe.base))
    by_window, pairs = [], []
    for visit in visits:
        window = maker.window(**visit)
        names = ["ABCDEFGH"[window.shown.tolist().index(i)] for i in range(len(window.rows))]
        lines = [f"[{'ABCDEFGH'[k]}] w{row}" for k, row in enumerate(window.rows[window.shown])]
        ids = tokenizer("\n".join([f"query : {window.query.text}", *lines, "rank["]))["input_ids"]
        answer = [*tokenizer(" > ".join(f"[{name}]" for name in names), add_special_tokens=False)["input_ids"][1:], 2]
        logits = [lm.next_logits(network, ids, answer[:k]) for k in range(len(answer))]
        by_window.append(np.mean([-float(x.log_softmax(0)[t]) for x, t in zip(logits, answer, strict=True)]))
        scores = [float(logits[0][tokenizer.convert_tokens_to_ids(name)]) for name in names]
        for i, j in itertools.combinations(range(len(names)), 2):
            if window.scores[i] > window.scores[j]:
                better = [int((window.scores > window.scores[k]).sum()) + 1 for k in (i, j)]
                pairs.append(np.log1p(np.exp(scores[j] - scores[i])) / sum(better))
    return float(np.mean(by_window)), float(np.mean(pairs))


def objective_of(student: ListwiseStudent, *, at_once: int = 32, recompute: bool = False) -> ListwiseObjective:
    from retrieval_kd.losses.objective import WeightedLosses

    network = student.language_model.network.to("cpu")
    weight = student.recipe.lm_weight
    losses = WeightedLosses(student.recipe.losses)
    return ListwiseObjective(network, losses, ["q"] * 30, lm_weight=weight, at_once=at_once, recompute=recompute)


def test_the_losses_are_those_of_the_paper(
    student: Callable[..., ListwiseStudent], collection: Collection, tmp_path: Path
) -> None:
    """Windows of 5, 3 and 2 documents, two of them with ties, which make no pair and share a rank."""
    changed = {"train-1": [-2.0, -1.0, -2.0], "train-2": [0.5, 2.5]}
    scores = tiny_listwise.make_scores(tmp_path / "scores", collection, changed)
    made = student(groups={"documents": 5}, lm_weight=0.5)
    maker = windows_of(made, collection, scores)
    visits = [{"query": query, "visit": 0} for query in range(3)]
    lm_loss, ranknet = plain_losses(made, maker, visits)
    batch = maker(visits)
    assert batch["present"].sum(dim=1).tolist() == [5, 3, 2]
    for at_once in (1, 32):
        losses = objective_of(made, at_once=at_once)(batch)
        assert list(losses) == ["lm", "ranknet"]
        assert losses["lm"].item() == pytest.approx(0.5 * lm_loss, rel=1e-5)
        assert losses["ranknet"].item() == pytest.approx(10 * ranknet, rel=1e-5)


def test_recomputed_parts_have_the_same_gradients(
    student: Callable[..., ListwiseStudent], collection: Collection, ranks: Path
) -> None:
    made = student()
    batch = windows_of(made, collection, ranks)([{"query": query, "visit": 0} for query in range(5)])

    def gradients(**how: Any) -> dict[str, torch.Tensor]:
        objective = objective_of(made, **how)
        objective.zero_grad()
        torch.stack(list(objective(batch).values())).sum().backward()
        return {name: weights.grad.clone() for name, weights in objective.named_parameters()}

    whole, again = gradients(), gradients(at_once=2, recompute=True)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-2
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-5, rtol=1e-3)


def test_parts_make_no_difference(fit_listwise: Trained) -> None:
    """Accumulated, recomputed and checkpointed parts, and windows made in a worker process: the same training."""
    whole = fit_listwise(lora={"rank": 4, "dropout": 0})
    parts = fit_listwise(
        lora={"rank": 4, "dropout": 0},
        accumulate=4,
        texts_at_once=1,
        recompute=True,
        gradient_checkpointing=True,
        workers=1,
    )
    np.testing.assert_allclose(tiny.losses(parts.path), tiny.losses(whole.path), rtol=1e-4)
    mine = tiny.weights(whole.path)
    for name, value in tiny.weights(parts.path).items():
        np.testing.assert_allclose(value, mine[name], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.2}])
def test_killed_and_resumed_gives_the_same_bytes(
    lora: Any,
    fit_listwise: Trained,
    resumed_equals: Trained,
) -> None:
    """Draws, dropout and the optimizer go on where the last checkpoint was; TAID's moving target too."""
    values: dict[str, Any] = {
        "lora": lora,
        "steps": 9,
        "losses": [
            {"kind": "ranknet", "weights": "rank", "weight": 10},
            {"kind": "taid", "target": {"transform": "reciprocal-rank"}},
        ],
        "development": {"against": "teacher", "times": 3},
    }
    resumed = resumed_equals(fit_listwise, values, goes_on_from=3)
    assert len(resumed.manifest.details["development"]["all"]) == 3


def test_the_development_measure_is_of_the_whole_order(
    student: Callable[..., ListwiseStudent], collection: Collection, ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 5 0 3 and others, always shown and ranked as they are: nDCG of their order, with grades 2 1 0."""
    made = student(development={"against": "teacher"})
    inputs = TrainingInputs(collection, made.recipe, [ranks])
    held = inputs.queries().queries[:3]
    evaluator = made._evaluator(inputs, held)
    assert evaluator is not None
    monkeypatch.setattr(ListwiseStudent, "pool_scores", lambda self, m, queries, documents, rows: -np.arange(3.0)[None])
    expected = []
    for pool in evaluator.pools:
        order = sorted(pool.tolist(), key=tiny_listwise.ORDER.index)
        gains = [2 - order.index(row) for row in pool.tolist()]
        expected.append((gains[0] + gains[1] / np.log2(3) + gains[2] / 2) / (2 + 1 / np.log2(3)))
    assert len(set(expected)) > 1
    assert evaluator(None)["development"] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0}])
def test_the_best_checkpoint_is_kept(lora: Any, fit_listwise: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of evaluations after 2, 4 and 6 steps the first is best: the weights are those after 2 of 6 steps."""
    kept: list[dict[str, torch.Tensor]] = []
    values = [0.9, 0.5, 0.3]

    def evaluated(self: PoolEvaluator, model: Any) -> dict[str, float]:
        kept.append({name: weights.clone() for name, weights in model.state_dict().items()})
        return {"development": values[len(kept) - 1]}

    monkeypatch.setattr(PoolEvaluator, "__call__", evaluated)
    model = fit_listwise(lora=lora, steps=6, development={"against": "teacher", "times": 3})
    assert model.manifest.details["development"]["all"] == values
    name = "model.layers.0.self_attn.q_proj"
    found = torch.tensor(tiny.weights(model.path)[f"{name}.weight"])

    def after(state: dict[str, torch.Tensor]) -> torch.Tensor:
        if lora is None:
            return state[f"{name}.weight"]
        a, b = (state[f"{name}.lora_{x}.default.weight"] for x in "AB")
        return state[f"{name}.base_layer.weight"] + 32 / 4 * b @ a

    torch.testing.assert_close(found, after(kept[0]))
    assert not torch.allclose(found, after(kept[2]), atol=1e-4)


def test_adapters_are_merged_and_alone_learn(fit_listwise: Trained, base: Path) -> None:
    """Linear layers change by a matrix of the adapters' rank; embeddings, norms and the head stay."""
    start, found = tiny.weights(base), tiny.weights(fit_listwise(lora={"rank": 2}).path)
    assert found.keys() == start.keys()
    for name, value in found.items():
        adapted = "proj" in name
        assert np.array_equal(value, start[name]) != adapted, name
        if adapted:
            assert np.linalg.matrix_rank(value - start[name], tol=1e-5) == 2


def test_bf16_follows_fp32(fit_listwise: Trained) -> None:
    """All weights are kept in float32; weights that adapters leave alone are in bfloat16."""
    full, half = fit_listwise(steps=2), fit_listwise(steps=2, precision="bf16")
    np.testing.assert_allclose(tiny.losses(half.path), tiny.losses(full.path), rtol=0.1)
    assert tiny.losses(half.path) != tiny.losses(full.path)
    assert {value.dtype for value in lm.plain(half.path)[0].state_dict().values()} == {torch.float32}
    adapted = fit_listwise(steps=2, precision="bf16", lora={"rank": 4, "dropout": 0})
    np.testing.assert_allclose(tiny.losses(adapted.path)[0], tiny.losses(full.path)[0], rtol=0.1)
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(adapted.path / "model.safetensors").values()} == {torch.bfloat16}


def test_no_steps_is_the_start(fit_listwise: Trained, base: Path, tmp_path: Path) -> None:
    (sampling := base / "generation_config.json").exists()
    model = fit_listwise(steps=0, inputs={"scores": []})
    start = tiny.weights(base)
    assert all((value == start[name]).all() for name, value in tiny.weights(model.path).items())
    assert (model.path / "generation_config.json").read_bytes() == sampling.read_bytes()
    shallow = fit_listwise(steps=0, inputs={"scores": []}, layers=[1])
    kept = tiny.weights(shallow.path)
    assert all((kept[name] == start[name.replace("layers.0.", "layers.1.")]).all() for name in kept)
    assert lm.plain(shallow.path)[0].config.num_hidden_layers == 1


def test_lists_without_an_order_are_left_out(
    fit_listwise: Trained, collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One document, equal scores, one of three documents scored; and one query of two documents, which stays."""
    changed = {"train-0": [-1.0], "train-1": [-1.0] * 3, "train-2": [-1.0], "train-3": [-1.0, -2.0]}
    scores = tiny_listwise.make_scores(tmp_path / "scores", collection, changed)
    run = tmp_path / "run"
    Run.from_hits(["train-2"], [["d01", "d02"]], [np.arange(2)]).save(run, recipe={"kind": "made"}, inputs={})
    model = fit_listwise(inputs={"scores": [scores], "candidates": run}, steps=1)
    counts = model.manifest.counts
    assert (counts["queries"], counts["queries_without_negative"], counts["queries_without_order"]) == (27, 1, 2)
    assert "2 queries without two different scores are left out: 'train-1', 'train-2'" in caplog.text
    everything = {query: [-1.0] * 3 for query in collection.queries("train")}
    scores = tiny_listwise.make_scores(tmp_path / "equal", collection, everything)
    with pytest.raises(InputError, match="no order to learn: none of 30 queries has two documents with different"):
        fit_listwise(inputs={"scores": [scores]})


def test_what_is_cut_is_counted(
    fit_listwise: Trained,
    student: Callable[..., ListwiseStudent],
    collection: Collection,
    ranks: Path,
    prompt: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """``<s> query : w w [A] … [B] … [C] … rank [`` is 16 tokens, so that 22 leave 2 of each passage's 4 words.

    30 windows of 3; in 16 tokens and less nothing is left to show.
    """
    whole = tiny.write_recipe(tmp_path / "whole.yaml", {**tiny_listwise.PROMPT, "passage_words": None})

    def counts(prompt: str, max_length: int, **values: Any) -> dict[str, int]:
        made = student(prompt=prompt, max_length=max_length, **values)
        return windows_of(made, collection, ranks).look_through()

    assert counts(whole, 22) == {"truncated_documents": 90, "tokens_lost": 180}
    assert "90 of 90 documents are cut in the first windows, by 180 tokens" in caplog.text
    assert counts(whole, 28) == {}
    assert counts(prompt, 64) == {"truncated_documents": 90, "tokens_lost": 270}
    assert counts(whole, 16) == {"truncated_documents": 90, "tokens_lost": 360}
    with pytest.raises(
        InputError, match=r"30 queries do not fit .* by up to 15 tokens: 'train-0', .* groups\.documents"
    ):
        counts(whole, 16, groups={"documents": 8})
    manifest = fit_listwise(prompt=whole, max_length=22, steps=1).manifest
    assert (manifest.counts["truncated_documents"], manifest.counts["tokens_lost"]) == (90, 180)


def test_a_model_that_cannot_rank_so(fit_listwise: Trained, tmp_path: Path, prompt: str) -> None:
    with pytest.raises(InputError, match="max_length 500 and an answer of 10 is more than the 509 tokens"):
        fit_listwise(max_length=500, base=str(lm.make_causal(tmp_path / "short", length=509)))
    with pytest.raises(InputError, match="is an encoder-decoder, whose answer cannot be begun"):
        fit_listwise(base=str(lm.make_encoder_decoder(tmp_path / "t5")))
    with pytest.raises(InputError, match="is no trained language model"):
        fit_listwise(base=str(tiny.make_transformer(tmp_path / "bert")))
    silent = lm.make_causal(tmp_path / "silent", lm.word_tokenizer(chat=None))
    with pytest.raises(InputError, match="has no chat template, which a prompt with messages: needs"):
        fit_listwise(base=str(silent), prompt="first", max_length=400)
    digits = tiny.write_recipe(tmp_path / "digits.yaml", {**tiny_listwise.PROMPT, "identifiers": "numbers"})
    with pytest.raises(InputError, match=r"'10' is 2 tokens .*; take a prompt with identifiers: letters"):
        fit_listwise(prompt=digits, groups={"documents": 10}, max_length=200)


def test_recipes_that_are_refused(fit_listwise: Trained, prompt: str, collection: Collection, tmp_path: Path) -> None:
    def refused(message: str, **values: Any) -> None:
        with pytest.raises(RecipeError, match=message):
            fit_listwise(**values)

    refused("27 passages in a window, but there are 26 letters", groups={"documents": 27})
    refused("prompt 'monot5' is pointwise; kind llm-listwise needs a listwise prompt", prompt="monot5")
    refused("cannot learn 'info-nce' over the batch", losses=[{"kind": "info-nce"}])
    refused("reads whole windows: give max_length", document_length=64)
    refused("leave out positive: qrels", groups={"positive": "qrels"})
    refused("reweight is not for a listwise ranker", groups={"mix": [1, 1], "reweight": {}})
    refused("take teacher, or nothing", development={"against": "qrels"})
    with pytest.raises(UsageError, match="these scores are ranks, and loss 'kl' reads their sizes"):
        fit_listwise(losses=[{"kind": "kl"}])
    with pytest.raises(UsageError, match="loss 'ranknet' needs a teacher's scores: give --scores"):
        fit_listwise(inputs={"scores": [], "candidates": tiny.make_candidates(tmp_path, collection)})
    other = tiny.make_tiny_collection(tmp_path, "other")
    with pytest.raises(InputError, match="these scores are of another collection"):
        fit_listwise(inputs={"collection": other})


def test_a_changed_prompt_is_another_model(fit_listwise: Trained, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    tiny.write_recipe(mine, tiny_listwise.PROMPT)
    first = fit_listwise(prompt=str(mine), steps=1)
    assert first.manifest.recipe["prompt_sha256"] == first.settings["prompt_sha256"]
    tiny.write_recipe(mine, {**tiny_listwise.PROMPT, "text": "{query}\n{passages}\nrank"})
    with pytest.raises(RetrievalKDError, match=r"another recipe \(prompt_sha256 differ"):
        fit_listwise(prompt=str(mine), steps=1, out=first.path)


def test_divergence_names_the_queries(fit_listwise: Trained, tmp_path: Path) -> None:
    base = lm.spoil(lm.make_causal(tmp_path / "spoilt"), "w5")
    with pytest.raises(
        RetrievalKDError, match=r"loss 'lm', 'ranknet' is NaN or infinite in a batch of 8 queries \('tr"
    ):
        fit_listwise(base=str(base))


def test_the_shipped_recipe() -> None:
    recipe = load_recipe("first", "students")
    assert isinstance(recipe, ListwiseStudent.Recipe) and recipe.prompt == "first"
    assert ListwiseStudent(recipe).names == list("ABCDEFGHIJKLMNOPQRST")
    (term,) = recipe.losses
    assert (term.kind, term.weight, recipe.lm_weight) == ("ranknet", 10, 1)
