"""The bridge to the sentence-transformers trainers: loss module, arguments, callbacks and the order of visits."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from retrieval_kd.artifact import write_atomically
from retrieval_kd.losses.objective import weighted_losses

if TYPE_CHECKING:
    from datasets import Dataset

    from retrieval_kd.losses.terms import LossTerm
    from retrieval_kd.students.base import Student, StudentRecipe
    from retrieval_kd.students.development import PoolEvaluator

log = logging.getLogger("retrieval_kd")

PARAMETERS = "objective.json"
_LINE_EVERY_SECONDS = 15.0


class Objective(torch.nn.Module):
    """The recipe's losses as the one loss module of the trainer; holds learned parameters that are not the model's."""

    def __init__(self, student: Student, model: Any, terms: list[LossTerm]) -> None:
        super().__init__()
        self.student = student
        self.model = model
        self.terms = terms
        self.extra = torch.nn.ParameterDict(student.extra_parameters())

    def forward(self, features: Any, labels: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Each loss by its kind, weighted; the trainer adds them up and logs each."""
        return weighted_losses(self.terms, self.student.outputs(self.model, self.extra, features, labels))

    def values(self) -> dict[str, float]:
        """The learned parameters as numbers."""
        return {name: float(value.detach()) for name, value in self.extra.items()}

    def load(self, folder: Path) -> None:
        """Takes over the parameters saved beside a checkpoint."""
        for name, value in json.loads((folder / PARAMETERS).read_text()).items():
            self.extra[name].data.fill_(value)

    def best_parameters(self, trainer: Any) -> dict[str, float]:
        """The parameters that belong to the weights the trainer ended with: its best checkpoint, where it keeps one."""
        best = trainer.state.best_model_checkpoint
        if best and (Path(best) / PARAMETERS).is_file():
            self.load(Path(best))
        return self.values()


class _KeepParameters(TrainerCallback):
    """Saves the objective's own parameters with every checkpoint and takes them back when a run goes on."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the parameters of the checkpoint that training goes on from."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and (folder / PARAMETERS).is_file():
            self.objective.load(folder)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes the parameters beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomically(folder / PARAMETERS, json.dumps(self.objective.values()).encode())


class _Say(TrainerCallback):
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


def planned_visits(queries: int, visits: int, seed: int) -> Dataset:
    """The order in which queries are visited, fixed before training: whole shuffled passes, one after another."""
    from datasets import Dataset

    passes = -(-visits // queries)
    order = np.concatenate([np.random.default_rng((seed, 0, n)).permutation(queries) for n in range(passes)])[:visits]
    return Dataset.from_dict({"query": order, "visit": np.arange(visits) // queries})


def in_planned_order(dataset: Any, **arguments: Any) -> DefaultBatchSampler:
    """A batch sampler that keeps the planned order."""
    return DefaultBatchSampler(SequentialSampler(dataset), **arguments)


def make_trainer(
    student: Student,
    recipe: StudentRecipe,
    model: Any,
    objective: Objective,
    collator: Any,
    visits: Dataset,
    dev: PoolEvaluator | None,
    checkpoints: Path,
    steps: int,
) -> Any:
    """The student's sentence-transformers trainer, ready to run."""
    trainer_class, arguments_class = student.trainer()
    model.model_card_data.generate_widget_examples = False
    every = max(1, -(-steps // recipe.development.times))
    arguments = arguments_class(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=int(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        batch_sampler=in_planned_order,
        logging_steps=max(1, steps // 100),
        logging_strategy="steps",
        logging_nan_inf_filter=False,  # else a diverged run logs the mean of its former losses
        eval_strategy="steps" if dev else "no",
        eval_steps=every if dev else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=dev is not None,
        metric_for_best_model="eval_development" if dev else None,
        greater_is_better=True if dev else None,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=visits,
        loss=objective,
        evaluator=dev,
        data_collator=collator,
        callbacks=[_KeepParameters(objective), _Say()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
