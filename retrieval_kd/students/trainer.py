"""The bridge to the sentence-transformers trainers: loss module, arguments, callbacks, checkpoints."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.trainer import BaseTrainer
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback

from retrieval_kd.errors import UsageError
from retrieval_kd.losses.objective import WeightedLosses
from retrieval_kd.models.encoder import quiet_loading
from retrieval_kd.models.onednn import onednn_training
from retrieval_kd.models.positions import cap_lengths
from retrieval_kd.students.base import Fitted
from retrieval_kd.students.collate import GroupCollator, without_weights
from retrieval_kd.students.development import held_out
from retrieval_kd.students.objective import STATE, DivergedError, LossModule, Objective
from retrieval_kd.students.visits import Gaps, Reweighting, measured_apart, planned_visits, visit_order

if TYPE_CHECKING:
    from retrieval_kd.plan import Draft
    from retrieval_kd.students.base import StudentRecipe, TrainerStudent
    from retrieval_kd.students.collate import TeacherVectors
    from retrieval_kd.students.development import PoolEvaluator
    from retrieval_kd.students.groups import TrainingQuery
    from retrieval_kd.students.inputs import TrainingInputs

log = logging.getLogger("retrieval_kd")

_LINE_EVERY_SECONDS = 15.0


def fit(student: TrainerStudent, inputs: TrainingInputs, draft: Draft) -> Fitted:
    """The student's model, trained as its recipe says; goes on from the last checkpoint in ``draft.work``."""
    recipe = inputs.recipe
    with quiet_loading():
        model = student.start()
    cut = cap_lengths(model)
    if recipe.steps == 0:
        return Fitted(model, student.settings({}) | cut)
    if recipe.lora:
        from retrieval_kd.models.lora import add_lora

        torch.manual_seed(recipe.seed)
        add_lora(model[0].auto_model, recipe.lora)
    queries, counts = inputs.queries()
    queries, held = held_out(recipe.development, queries, recipe.seed)
    measured: list[list[TrainingQuery]] = []
    if recipe.groups.reweight:
        queries, measured = measured_apart(queries, recipe.groups.reweight, recipe.seed)
    steps = recipe.planned_steps(len(queries))
    dev = student.evaluator(inputs, held)
    vectors = inputs.teacher_vectors([*queries, *chain.from_iterable(measured)])
    if vectors is not None and any(term.kind == "embedding" for term in recipe.losses):
        vectors.check_dimension(int(model.get_embedding_dimension()))
    losses = WeightedLosses(
        recipe.losses,
        passes=steps * recipe.accumulate,
        dimensions=_dimensions(model, vectors) if any(term.kind == "mi-alpha" for term in recipe.losses) else None,
    )
    objective = Objective(student, model, losses, [query.query_id for query in queries])
    for_texts = without_weights(model) if recipe.workers else model
    collator = GroupCollator(student, for_texts, inputs.collection, queries, recipe.groups, recipe.seed, vectors)
    visits = planned_visits(queries, steps * recipe.batch_size, recipe.seed, len(recipe.groups.mix or [1]))
    order = visit_order(recipe, steps)
    reweighting = []
    if recipe.groups.reweight:
        gaps = Gaps(objective, collator, measured, queries_at_once(recipe))
        reweighting = [Reweighting(recipe.groups.reweight, order, gaps)]
    checkpoints = draft.work / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _freeze_unused(objective, collator([visits[i] for i in range(min(2, len(visits)))]))
    _, arguments_class = student.trainer()
    more = {"batch_sampler": order.batches, **student.arguments()}
    arguments = training_arguments(arguments_class, recipe, checkpoints, steps, evaluated=dev is not None, **more)
    trainer = _make_trainer(student, model, arguments, objective, collator, visits, dev, reweighting)
    log.info("training on %d queries for %d steps of %d", len(queries), steps, recipe.batch_size)
    trained = train_to_the_end(trainer, objective)
    if recipe.lora:
        from retrieval_kd.models.lora import merge_lora

        merge_lora(trained[0].auto_model)
    counts = {"queries": len({query.query_id for query in queries}), "steps": steps} | counts
    return Fitted(trained, student.settings(objective.values()) | cut, trainer.state.log_history, counts)


def train_to_the_end(trainer: Any, objective: LossModule) -> Any:
    """The network that ``trainer`` trained, the best where it was evaluated; goes on from its last checkpoint."""
    checkpoints = Path(trainer.args.output_dir)
    last = last_checkpoint(checkpoints)
    if last:
        log.info("going on from %s", last.name)
    try:
        with quiet_loading(), onednn_training(trainer.model):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except DivergedError as error:
        good = last_checkpoint(checkpoints)
        kept = f"the last good model is {good}" if good else "no checkpoint was written before"
        raise DivergedError(f"{error}; {kept}") from error
    best = trainer.state.best_model_checkpoint
    if best and (Path(best) / STATE).is_file():
        objective.load(Path(best))
    return trainer.accelerator.unwrap_model(trainer.model)


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    whole = [folder for folder in checkpoints.glob("checkpoint-*") if (folder / STATE).is_file()]
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _dimensions(model: Any, vectors: TeacherVectors | None) -> tuple[int, int] | None:
    """Of the student's and the teacher's vectors."""
    return None if vectors is None else (int(model.get_embedding_dimension()), vectors.dimension)


def training_arguments(
    arguments_class: type[Any], recipe: StudentRecipe, checkpoints: Path, steps: int, *, evaluated: bool, **more: Any
) -> Any:
    """The trainer's arguments as the recipe says; ``evaluated`` where there is a development evaluation."""
    on_gpu = torch.cuda.is_available()
    every = max(1, -(-steps // recipe.development.times))
    return arguments_class(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=queries_at_once(recipe),
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=int(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        logging_steps=max(1, steps // 100),
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every if evaluated else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=evaluated,
        metric_for_best_model="eval_development" if evaluated else None,
        greater_is_better=True if evaluated else None,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=on_gpu,
        bf16=in_bf16(recipe),
        **more,
    )


def queries_at_once(recipe: StudentRecipe) -> int:
    """Queries of a forward pass of one process."""
    parts = recipe.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.batch_size % parts:
        raise UsageError(
            f"batch_size: {recipe.batch_size} queries cannot be divided into {parts} equal parts "
            f"(accumulate: {recipe.accumulate}, {parts // recipe.accumulate} processes)"
        )
    return recipe.batch_size // parts


def in_bf16(recipe: StudentRecipe) -> bool:
    """Whether forward passes are computed in bfloat16."""
    if recipe.precision == "auto":
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported())
    return recipe.precision == "bf16"


def checkpoint_activations(model: Any) -> None:
    """Keeps the activations of whole layers only; a layer is run again in the backward pass."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            name = "activation_checkpointing_enable"
            getattr(module, name if hasattr(module, name) else "gradient_checkpointing_enable")()


def _freeze_unused(objective: Objective, inputs: dict[str, Any]) -> None:
    """Freezes weights that no loss depends on (BERT's pooler): processes would wait for their gradients for ever."""
    features, labels = BaseTrainer.collect_features(None, inputs)
    training = objective.training
    objective.eval()  # a moving target stays where it is
    torch.stack(list(objective(features, labels).values())).sum().backward()
    objective.train(training)
    for parameter in objective.model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    objective.zero_grad()


def _make_trainer(
    student: TrainerStudent,
    model: Any,
    arguments: Any,
    objective: Objective,
    collator: GroupCollator,
    visits: Any,
    dev: PoolEvaluator | None,
    callbacks: Sequence[TrainerCallback],
) -> Any:
    trainer_class, _ = student.trainer()
    if student.recipe.lora:
        from retrieval_kd.models.lora import with_small_checkpoints

        trainer_class = with_small_checkpoints(trainer_class)
    model.model_card_data.set_widget_examples = lambda dataset: None  # it would draw a bar, and the card is ours
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=visits,
        loss=student.loss(objective),
        evaluator=dev,
        data_collator=collator,
        callbacks=[*callbacks, KeepState(objective), Say(), *student.callbacks(objective)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class KeepState(TrainerCallback):
    """Saves the objective's own state with every checkpoint, and keeps it the same in all processes."""

    def __init__(self, objective: LossModule) -> None:
        self.objective = objective

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the state of the checkpoint that training goes on from."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and (folder / STATE).is_file():
            self.objective.load(folder)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes the state beside the checkpoint; `DivergedError` where a weight is no number (it counts as none)."""
        self.objective.check_weights(state.global_step)
        if state.is_world_process_zero:
            self.objective.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Averages over the processes what is not the model's, gradients and buffers: the trainer does the model's."""
        if not torch.distributed.is_initialized():
            return
        own = [p.grad for name, p in self.objective.named_parameters() if not name.startswith("model.")]
        own += [b for name, b in self.objective.named_buffers() if not name.startswith("model.")]
        for value in own:
            if value is not None and value.is_floating_point():
                torch.distributed.all_reduce(value)
                value /= torch.distributed.get_world_size()


class Say(TrainerCallback):
    """Says the loss and the remaining time on the log now and then."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self.began = self.said = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line every few seconds."""
        if not logs or "loss" not in logs or time.monotonic() - self.said < _LINE_EVERY_SECONDS:
            return
        self.said = time.monotonic()
        speed = (state.global_step - self.first_step) / (self.said - self.began)
        left = (state.max_steps - state.global_step) / speed
        log.info("step %d of %d, loss %.4f, %.0f s left", state.global_step, state.max_steps, logs["loss"], left)
