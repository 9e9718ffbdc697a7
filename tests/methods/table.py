"""The combinations that every shared check runs on, from what the registries hold when they are asked for.

`combinations()` covers every two entries that work together: each pair of an estimator, a rule, a direction and a subspace
is in at least one combination. What the engine refuses with a ValueError is left out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import seeded
from tests.subspaces.helpers import sgd, with_scales
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ESTIMATORS
from zo_hf.parallel.ranks import Ranks
from zo_hf.rules import RULES
from zo_hf.subspaces import SUBSPACES, Subspace, has_factors, subspace_kind

REGISTRIES: dict[str, Mapping[str, Any]] = {
    "estimator": ESTIMATORS,
    "rule": RULES,
    "direction": DISTRIBUTIONS,
    "subspace": SUBSPACES,
}
DIRECTIONS = 2  # of a step: enough for what compares them, and to be shared out between two processes
FOLD_STEPS = 2
# Of a rule that has a period, one that is as short as the folds here.
SHORT: dict[str, dict[str, int]] = {"svrg": {"svrg_batches": 1, "svrg_steps": 1}}
ROWS, WIDTH, CLASSES, TOKENS = 4, 8, 3, 11
#: On which every check runs: `ZO_HF_TEST_DEVICE=cuda` in the environment runs them on a GPU.
DEVICE = torch.device(os.environ.get("ZO_HF_TEST_DEVICE", "cpu"))


@dataclass(frozen=True)
class Combination:
    """One entry of every registry, by name."""

    estimator: str
    rule: str
    direction: str
    subspace: str

    def __str__(self) -> str:
        return "-".join(astuple(self))

    @cached_property
    def entries(self) -> set[tuple[str, str]]:
        """(registry, name) of each."""
        return set(zip(REGISTRIES, astuple(self), strict=True))

    @cached_property
    def pairs(self) -> set[tuple[tuple[str, str], tuple[str, str]]]:
        """Every two of them, in the order of the registries."""
        return set(itertools.combinations(zip(REGISTRIES, astuple(self), strict=True), 2))


class Tiny(nn.Module):
    """Of what a language model has, one of each and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (rows, length) -> (rows, CLASSES)"""
        x = self.embed(tokens).mean(1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(x))


class TinyLoss:
    """Cross-entropy on one batch, which probes can share a forward pass for."""

    rows = ROWS

    def __init__(self, model: nn.Module, batch: int = 0, device: torch.device = DEVICE) -> None:
        generator = torch.Generator().manual_seed(batch)
        self.model = model
        # Every token is used, so that no row of the embedding is without effect.
        self.tokens = (torch.randperm(3 * ROWS, generator=generator).view(ROWS, 3) % TOKENS).to(device)
        self.labels = torch.randint(0, CLASSES, (ROWS,), generator=generator).to(device)

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.model(self.tokens), self.labels)

    def batched(self, copies: int) -> Tensor:
        logits = self.model(self.tokens.repeat(copies, 1))
        return torch.stack([F.cross_entropy(part, self.labels) for part in logits.chunk(copies)])


@dataclass
class Subject:
    """An engine, its optimizer, and a loss for it."""

    zo: ZerothOrder
    optimizer: torch.optim.Optimizer
    loss: TinyLoss
    #: The numbers of every step, as a trajectory records them.
    numbers: list[tuple[float, ...]] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.zo.model

    def step(self, loss: Callable[[], Tensor] | None = None) -> None:
        """Take one step."""
        self.zo.estimate(self.loss if loss is None else loss)
        self.optimizer.step()

    def bits(self) -> dict[str, Tensor]:
        """A copy of all that a step may change: weights, coordinates, and what the rule remembers."""
        tensors = dict(self.model.state_dict(keep_vars=True))
        tensors |= {f"coordinates of {name}": c for name, c in self.zo.subspace.coordinates.items()}
        tensors |= {f"rule's {name}": tensor for name, tensor in self.zo.rule.state().items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def subject(
    combination: Combination,
    seed: int = 0,
    batched: bool = False,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-2,
    eps: float | None = None,
    fold_steps: int = FOLD_STEPS,
    batch: int = 0,
    device: torch.device = DEVICE,
) -> Subject:
    """A combination on a model of its own.

    Raises:
        ValueError: its entries do not work together.
    """
    model = with_scales(combination.subspace, seeded(Tiny, dtype).to(device))
    kind = SUBSPACES[combination.subspace]
    factors = {"rank": 2, "fold_steps": fold_steps, "seed": seed}
    space = kind(model, **factors) if has_factors(kind) else combination.subspace
    zo = engine(combination, model, space, seed=seed, batched_probes=batched, ranks=ranks, eps=eps)
    made = Subject(zo, sgd(zo, lr), TinyLoss(model, batch, device))
    zo.on_step = lambda step: made.numbers.append(step.projected_gradients)
    return made


def engine(combination: Combination, model: nn.Module, space: str | Subspace, **options: Any) -> ZerothOrder:
    """The combination's engine on a model and a subspace of it, or the name of one."""
    return ZerothOrder(
        model,
        space,
        estimator=combination.estimator,
        rule=combination.rule,
        **SHORT.get(combination.rule, {}),
        direction=combination.direction,
        num_directions=DIRECTIONS,
        **options,
    )


@cache
def refusal(combination: Combination) -> str | None:
    """What the engine says to a combination that it does not take; None for one that it does."""
    held = ESTIMATORS[combination.estimator].along_coordinates
    try:
        model, space = _untouched(combination.subspace, held)
        sgd(engine(combination, model, space), lr=1e-2)
    except ValueError as error:
        return str(error)
    _untouched.cache_clear()
    return None


@cache
def _untouched(subspace: str, held: bool) -> tuple[nn.Module, Subspace]:
    """A model and a subspace of it that no engine has entered: one that is refused leaves them to the next."""
    model, kind = with_scales(subspace, seeded(Tiny)), subspace_kind(subspace, held)
    return model, kind(model, rank=2, fold_steps=FOLD_STEPS) if has_factors(kind) else kind(model)


def combinations(entry: tuple[str, str] | None = None) -> list[Combination]:
    """As few as come with little effort, so that every two entries that work together are in one.

    Args:
        entry: cover only what works together with this one, (registry, name).
    """
    return list(_combinations(tuple(tuple(registry) for registry in REGISTRIES.values()), entry))


@cache
def _combinations(names: tuple[tuple[str, ...], ...], entry: tuple[str, str] | None) -> list[Combination]:
    everything = [Combination(*chosen) for chosen in itertools.product(*names)]
    wanted = [c for c in everything if entry is None or entry in c.entries]
    covered: set[Any] = set()
    refused: set[Any] = set()  # whatever contains such a pair needs no trial
    chosen = []
    for pair in dict.fromkeys(pair for c in wanted for pair in sorted(c.pairs) if entry is None or entry in pair):
        if pair in covered:
            continue
        candidates = [c for c in wanted if pair in c.pairs and not c.pairs & refused]
        best = first_valid(sorted(candidates, key=lambda c: -len(c.pairs - covered)))
        if best is None:
            refused.add(pair)
        else:
            chosen.append(best)
            covered |= best.pairs
    return chosen


def one_for_every_entry() -> list[Combination]:
    """Few combinations that contain every entry once."""
    chosen: list[Combination] = []
    seen: set[tuple[str, str]] = set()
    every = combinations()
    while rest := {entry for c in every for entry in c.entries} - seen:
        chosen.append(max(every, key=lambda c: len(c.entries & rest)))
        seen |= chosen[-1].entries
    return chosen


def first_valid(candidates: Iterable[Combination]) -> Combination | None:
    """The first that the engine takes."""
    return next((c for c in candidates if refusal(c) is None), None)
