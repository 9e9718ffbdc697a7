"""The losses of a population's members on a micro-batch of prompts, for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import At
from zo_hf.parallel.ranks import Ranks
from zo_hf.rewards.metrics import RewardMetrics
from zo_hf.rewards.population import assign, losses_of_members
from zo_hf.trainer.micro_batch import MicroBatch


class RewardLosses:
    """Makes the loss of every micro-batch, and its weight in the step's loss.

    Args:
        trainer: an `EvolutionTrainer`.
        ranks: the processes that train together.

    Attributes:
        metrics: those of the training's steps.
        passes_beside, repeats: as in `zo_hf.trainer.loss.MicroBatchLosses`; a reward has no effects that are to be left out.

    Raises:
        ValueError: a callback of the trainer measures the loss at other points than the members.
    """

    passes_beside = 0
    repeats = False

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        if trainer._stability is not None:
            raise ValueError(
                "StabilityCallback measures the curvature of a loss, which rewards do not have; leave it out of callbacks."
            )
        self._trainer, self._ranks, self._micro_batch = trainer, ranks, 0
        self.metrics: RewardMetrics = trainer.new_metrics()

    def of(self, model: Any, batch: MicroBatch, counts: bool = True) -> tuple[PopulationLoss, float]:
        """Return the loss of a micro-batch, and its weight.

        Args:
            model: the module that Trainer calls; answers come from the model inside.
            batch: the micro-batch.
            counts: unused.
        """
        self._micro_batch = 0 if self._trainer.zo.at_start_of_step else self._micro_batch + 1
        grid, each = self._ranks.grid, self._trainer._train_batch_size
        first = (self._micro_batch * grid.data + grid.data_index) * each
        return PopulationLoss(self._trainer, batch.inputs, first, self.metrics), 1.0 / batch.of_step


class PopulationLoss:
    """The loss of a micro-batch at all members, a `JointLoss`: minus the fitness of their answers.

    Args:
        trainer: an `EvolutionTrainer`.
        inputs: the micro-batch.
        first: number of its first prompt within the step.
        metrics: collects the metrics of the answers.
    """

    def __init__(self, trainer: Any, inputs: Mapping[str, Any], first: int, metrics: RewardMetrics) -> None:
        self._trainer, self._inputs, self._first, self._metrics = trainer, inputs, first, metrics

    def __call__(self) -> Tensor:
        """Return minus the mean reward of one answer to every prompt at the current point, ()."""
        trainer = self._trainer
        rows = range(len(self._inputs["prompts"]))
        answers = trainer.generator.answers(self._inputs, rows, self._first, trainer.zo.step)
        return -trainer.score(self._inputs, rows, answers)[1].mean()

    def losses_at(self, probes: Sequence[Probe], at: At) -> Tensor:
        """Return the losses of the members, (len(probes),), float64."""
        trainer, inputs = self._trainer, self._inputs
        prompts, members = len(inputs["prompts"]), len(probes)
        assignment = assign(prompts, self._first, members // 2, trainer.args.members_per_prompt // 2)
        generated = trainer.generator.answers_of_members(
            inputs, assignment.prompts, self._first, trainer.zo, probes, at
        )
        answers = [generated[answer.row] for answer in assignment.answers]
        rewards, totals = trainer.score(inputs, [answer.prompt for answer in assignment.answers], answers)
        self._metrics.see(rewards, totals.view(prompts, -1), answers, trainer.generator.ends)
        losses = losses_of_members(totals, assignment, members, trainer.args.fitness, abs(probes[0].scale))
        device = torch.device("cpu") if inputs["input_ids"].device.type == "mps" else inputs["input_ids"].device
        return losses.to(device)
