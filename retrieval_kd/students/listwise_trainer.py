"""Training a listwise language model: its losses, and the trainer of transformers that logs and evaluates them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from retrieval_kd.losses.objective import Outputs, WeightedLosses
from retrieval_kd.models.decoding import reading_at
from retrieval_kd.students.listwise_windows import NOT_A_TARGET
from retrieval_kd.students.objective import LossModule
from retrieval_kd.students.parts import in_parts
from retrieval_kd.students.trainer import KeepState, Say, training_arguments
from retrieval_kd.students.visits import VisitOrder, planned_visits, visit_order

if TYPE_CHECKING:
    from retrieval_kd.students.base import StudentRecipe
    from retrieval_kd.students.development import PoolEvaluator
    from retrieval_kd.students.listwise_windows import WindowMaker


class ListwiseObjective(LossModule):
    """FIRST (Reddy et al. 2024): the language model's loss on the teacher's order, and losses on identifiers' logits.

    The logits are those of the first token of an answer. ``at_once`` windows are read at a time.
    """

    def __init__(
        self,
        network: Any,
        losses: WeightedLosses,
        query_ids: Sequence[str],
        *,
        lm_weight: float,
        at_once: int,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.model = network
        self.losses = losses
        self.query_ids = query_ids
        self.lm_weight = lm_weight
        self.at_once = at_once
        self.recompute = recompute

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss by its key, weighted: ``lm``, the mean over windows of their mean over tokens, and the terms."""
        names = ("input_ids", "attention_mask", "positions", "targets", "identifiers")
        lengths = batch["attention_mask"].sum(dim=1)
        read = in_parts(
            self._read, {name: batch[name] for name in names}, lengths, self.at_once, recompute=self.recompute
        )
        present = batch["present"]
        outputs = Outputs(scores=read[:, 1:], present=present, teacher=batch["teacher"], known=present)
        losses = {"lm": self.lm_weight * read[:, 0].mean(), **self.losses(outputs)}
        return self.checked(losses, batch["query"])

    def _read(self, part: dict[str, Tensor]) -> Tensor:
        """[n, 1 + N] float32: each window's mean loss of its answer's tokens, and the logits of its identifiers."""
        network = getattr(self.model, "module", self.model)  # inside what joins several processes
        with reading_at(network, part["positions"]):
            inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
            logits = self.model(**inputs, use_cache=False).logits.float()
        targets = part["targets"]
        by_token = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=NOT_A_TARGET, reduction="none"
        )
        by_window = by_token.sum(dim=1) / (targets != NOT_A_TARGET).sum(dim=1)
        return torch.cat([by_window.unsqueeze(1), logits[:, 0].gather(1, part["identifiers"])], dim=1)


class ListwiseTrainer(Trainer):
    """Visits windows in a given order, logs each loss beside their sum, and evaluates on held-out windows."""

    control: Any

    def __init__(
        self, objective: ListwiseObjective, order: VisitOrder, evaluator: PoolEvaluator | None, **more: Any
    ) -> None:
        super().__init__(
            model=objective.model,
            eval_dataset=() if evaluator else None,
            callbacks=[KeepState(objective), Say()],
            **more,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.model_accepts_loss_kwargs = False  # the loss of an accumulated part is a mean, and is divided by them
        self.objective = objective.to(self.args.device)
        self.order = order
        self.evaluator = evaluator
        self.passes: list[dict[str, Tensor]] = []
        """The losses of each forward pass since the last line of the log."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The sum of the losses."""
        self.objective.model = model
        losses = self.objective(inputs)
        self.passes.append({key: value.detach() for key, value in losses.items()})
        loss = torch.stack(list(losses.values())).sum()
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss, over all processes, where the sum is logged."""
        if "loss" in logs and self.passes:
            for key in self.passes[0]:
                mean = torch.stack([losses[key] for losses in self.passes]).mean()
                logs[key] = round(float(self.accelerator.reduce(mean, "mean")), 4)
            self.passes = []
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """``eval_development``, that of the first process for all."""
        assert self.evaluator is not None
        self.model.eval()
        found = broadcast_object_list([self.evaluator(self.model)])[0]
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> VisitOrder:
        return self.order

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def make_trainer(
    recipe: StudentRecipe,
    objective: ListwiseObjective,
    windows: WindowMaker,
    steps: int,
    checkpoints: Path,
    evaluator: PoolEvaluator | None,
) -> ListwiseTrainer:
    """The trainer as the recipe says; checkpoints of adapters hold nothing else."""
    trainer_class = ListwiseTrainer
    if recipe.lora:
        from retrieval_kd.models.lora import with_small_checkpoints

        trainer_class = with_small_checkpoints(trainer_class)
    evaluated = evaluator is not None
    return trainer_class(
        objective,
        visit_order(recipe, steps),
        evaluator,
        args=training_arguments(
            TrainingArguments, recipe, checkpoints, steps, evaluated=evaluated, remove_unused_columns=False
        ),
        train_dataset=planned_visits(windows.lists, steps * recipe.batch_size, recipe.seed),
        data_collator=windows,
    )
