"""The initial learning rate of a training: a given number, the subspace's default, or the result of a search."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import get_scheduler
from transformers.trainer_utils import has_length

from zo_hf import checkpoint
from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.lr_finder.find import LRFinderResult, find_learning_rate
from zo_hf.lr_finder.optimizer_units import check_findable
from zo_hf.lr_finder.predicted_loss import CONSTANT, Schedule
from zo_hf.lr_finder.report import one_line
from zo_hf.lr_finder.step_groups import Batch
from zo_hf.parallel.ranks import Grid
from zo_hf.subspaces.evaluation_mode import in_evaluation_mode
from zo_hf.trainer.argument_values import check_learning_rate
from zo_hf.trainer.budget import Budget
from zo_hf.trainer.config import ZOConfig, number_or_auto

logger = logging.getLogger(__name__)

#: The search approximates a schedule by this number of pieces of the run; each is a mean over this number of moments.
PIECES, MOMENTS = 32, 32
#: Schedules that react to the run, so that their factors are not known beforehand.
_REACTING = ("reduce_lr_on_plateau", "greedy")


@dataclass
class InitialLearningRate:
    """The resolved learning rate of a training; `ZOConfig` keeps the user's value.

    Attributes:
        value: the rate; with a search, the default until the search has ended.
        is_searched: True if the user asked for "auto".
        awaits_search: True if the user asked for "auto" and the rate is not found, or read from a checkpoint, yet.
        result: what the search found; None without one.
    """

    value: float
    is_searched: bool = False
    awaits_search: bool = False
    result: LRFinderResult | None = None

    def __str__(self) -> str:
        return "learning_rate='auto'" if self.is_searched else f"learning_rate={self.value:g}"


def initial_learning_rate(given: str | float | None, zo: ZerothOrder) -> InitialLearningRate:
    """Return the rate that an engine's training begins with.

    Args:
        given: a number, "auto", or None for the subspace's default.
        zo: the engine.

    Raises:
        ValueError: it is none of these; a hyperparameter search may have set it.
    """
    given = number_or_auto("learning_rate", given)
    check_learning_rate(given)
    if given is not None and given != "auto":
        return InitialLearningRate(float(given))
    default = zo.subspace.default_learning_rate
    if not zo.rule.divides_scale_out and zo.normalization is None:
        default = zo.estimator.learning_rate(default)
    searches = given == "auto"
    return InitialLearningRate(default, is_searched=searches, awaits_search=searches)


def check_searchable(
    zo: ZerothOrder, optimizer: Optimizer, config: ZOConfig, dataset: Any, facts: frozenset[str]
) -> None:
    """Refuse, before the first forward pass, a run whose learning rate cannot be searched for.

    Args:
        zo: the engine.
        optimizer: the optimizer of the coordinates.
        config: the run's arguments.
        dataset: the training data.
        facts: see `zo_hf.compatibility.Case`.

    Raises:
        ValueError: a search is not possible; the message names the argument and the way out.
    """
    check(Case(zo.settings, {**vars(config), "learning_rate": "auto"}, facts, subspace=zo.subspace))
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        raise ValueError(
            "learning_rate='auto' draws batches from all of train_dataset, which has no length; give a number."
        )
    check_findable(zo, optimizer)


def rate_of_checkpoint(folder: Path | None) -> float | None:
    """Return the rate that a checkpoint's run has found by its search; None without a checkpoint of this package.

    Raises:
        ValueError: the learning rate of that run was not "auto".
    """
    state = {} if folder is None else checkpoint.read_state(folder)
    if not state:
        return None
    if state.get("learning_rate") is None:
        raise ValueError(f"{folder} is of a run whose learning_rate was not 'auto'; resume with the same number.")
    return float(state["learning_rate"])


def schedule_of(config: ZOConfig, num_training_steps: int, steps: int, rate: float) -> Schedule:
    """Return the factors by which a schedule multiplies the rate during a run.

    Args:
        config: the run's arguments.
        num_training_steps: number of steps that the schedule is made for.
        steps: number of steps that the run takes.
        rate: the initial rate, which some schedules depend on.

    Returns:
        The mean factor and the mean squared factor of each of `PIECES` pieces of the run.
    """
    if config.lr_scheduler_type in _REACTING:
        return CONSTANT
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer=SGD([nn.Parameter(torch.zeros(1))], lr=rate),
        num_warmup_steps=config.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
    assert isinstance(scheduler, LambdaLR)
    (multiple,) = scheduler.lr_lambdas
    count = PIECES * MOMENTS
    each = [float(multiple((2 * i + 1) * steps // (2 * count))) for i in range(count)]
    pieces = [each[i : i + MOMENTS] for i in range(0, count, MOMENTS)]
    return [(sum(piece) / MOMENTS, sum(m * m for m in piece) / MOMENTS) for piece in pieces]


def step_batches(
    dataset: Any, collate: Callable[[list], Any], grid: Grid, seed: int, micro_batches: int, rows: int
) -> Callable[[], list[Any]]:
    """Return a function that draws this rank's micro-batches of a step, without an effect on the run's own data order.

    Args:
        dataset: the training data, with a length.
        collate: makes a batch of rows.
        grid: the grid of ranks, with this rank's place.
        seed: seed of the order.
        micro_batches: number of micro-batches in a step.
        rows: number of rows in a micro-batch.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Any]:
        order = torch.randperm(len(dataset), generator=generator).tolist()
        # All ranks need equally many rows, and all micro-batches of a step, even if the data set has fewer rows.
        stop = micro_batches * grid.data * rows
        own = list(itertools.islice(itertools.cycle(order), grid.data_index, stop, grid.data))
        parts = [own[i : i + rows] for i in range(0, len(own), rows)]
        return [collate([dataset[i] for i in part]) for part in parts]

    return draw


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Enter a context with the model in evaluation mode; its exit restores the modes and the random generators."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), in_evaluation_mode(model):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def search(
    zo: ZerothOrder,
    optimizer: Optimizer,
    draw: Callable[[], Batch],
    budget: Budget,
    config: ZOConfig,
    num_training_steps: int,
    default: float,
) -> LRFinderResult:
    """Search for the rate of a run that is about to begin, and log the result.

    Args:
        zo: the engine.
        optimizer: the optimizer of the coordinates.
        draw: draws the micro-batches of a step, and returns a closure and a weight for each.
        budget: the run's budget of steps and forward passes.
        config: the run's arguments.
        num_training_steps: number of steps that the schedule is made for.
        default: the rate if the search cannot find one.

    Returns:
        The result, with the same rate on every rank.
    """
    steps = num_training_steps
    if config.zo_max_forward_passes is not None:
        steps = min(steps, budget.steps())
    schedule = schedule_of(config, num_training_steps, steps, default)
    with undisturbed(zo.model):
        result = find_learning_rate(
            zo, optimizer, draw, budget.of_search(num_training_steps), steps, default, schedule
        )
    # All ranks have measured the same losses, but their processors may round a square root differently.
    rate = torch.tensor(result.learning_rate, dtype=torch.float64)
    on_device = rate.to(config.device) if config.device.type != "mps" else rate
    zo.ranks.broadcast(on_device)
    result = replace(result, learning_rate=float(on_device))
    logger.info("learning_rate='auto': %s", one_line(result))
    if result.warnings:
        doubts = "; ".join(warning.removesuffix(".") for warning in result.warnings)
        logger.warning("learning_rate='auto' is not sure: %s.", doubts)
    return result


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    optimizer.defaults["lr"] = rate
    for group in optimizer.param_groups:
        group["lr"] = rate
