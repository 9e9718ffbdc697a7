"""What every method must do, whatever it is: one function for each guarantee, which takes a combination of the table."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.conftest import assert_same_bits
from tests.methods.table import DEVICE, DIRECTIONS, ROWS, TOKENS, WIDTH, Combination, Subject, subject
from zo_hf import checkpoint
from zo_hf.estimators.estimate import Step
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.rules import RULES

LEARNING_RATE = 0.1


def probes_write_nothing(combination: Combination) -> None:
    """Weights and coordinates keep their bits, however a probe ends, and the model is then at no probe."""
    for batched in (False, True):
        it = _with_probes_in_one_batch(combination) if batched else subject(combination)
        if it is None:
            continue
        calls = _Calls(it)
        it.step(calls)  # off the origin
        before, loss = it.bits(), it.loss()
        for error in (RuntimeError, KeyboardInterrupt):
            for call in {1, calls.count}:
                it.zo.discard()
                with pytest.raises(error, match="stopped"):
                    # At this call and all later ones: a failed forward for all probes is repeated one by one.
                    it.zo.estimate(_Calls(it, dict.fromkeys(range(call, 99), error("stopped"))))
                _same_weights(it, before)
                assert torch.equal(it.loss(), loss)
        it.zo.discard()
        assert it.zo.estimate(it.loss).is_finite
        _same_weights(it, before)


def the_seed_decides(combination: Combination) -> None:
    """The same bits again whatever torch's own generator does, which is left alone, and others with another seed."""
    first = _after(combination, 3, fold_steps=0)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        state = torch.get_rng_state()
        again = _after(combination, 3, fold_steps=0)
        assert torch.equal(torch.get_rng_state(), state)
    _same(again, first)
    others = subject(combination, fold_steps=0), _after(combination, 3, seed=1, fold_steps=0)
    start, one, other = (_coordinates(it) for it in (others[0], first, others[1]))
    moved = int((one != start).sum())
    if not moved and RULES[combination.rule].candidates:
        assert {numbers[-1] for numbers in first.numbers} == {0.0}, "it has chosen to go, and stays"
        return
    assert moved, "three steps moved nothing"
    if torch.equal(one, other):
        assert moved <= 3 * DIRECTIONS, "only single coordinates, taken in turn, may be the same for every seed"


def a_resumed_run_has_the_same_bits(combination: Combination) -> None:
    """What a checkpoint holds is all that the rest of the run depends on; it is written between two folds."""
    whole = _after(combination, 5)
    killed = _after(combination, 3)
    with TemporaryDirectory() as folder:
        checkpoint.CheckpointWriter().save(killed.zo, Path(folder))
        resumed = subject(combination)
        for name, tensor in resumed.model.state_dict().items():  # live, where bitsandbytes would refuse to load
            tensor.copy_(killed.model.state_dict(keep_vars=True)[name])
        assert checkpoint.load(resumed.zo, Path(folder))
    resumed.optimizer.load_state_dict(killed.optimizer.state_dict())
    _same_weights(resumed, killed.bits())
    for _ in range(2):
        resumed.step()
    assert resumed.numbers == whole.numbers[3:]
    assert resumed.zo.state_dict() == whole.zo.state_dict()
    _same(resumed, whole, numbers=False)


def its_numbers_replay(combination: Combination) -> None:
    """The recorded numbers give the same bits without a forward pass, a step that was skipped included."""
    steps: list[Step] = []
    run = subject(combination)
    note = run.zo.on_step
    assert note is not None
    run.zo.on_step = lambda step: (note(step), steps.append(step))[0]
    for number in range(5):
        run.step(_Calls(run, {1: math.nan}) if number == 1 else None)
    replayed = subject(combination)
    replayed.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    for step in steps:
        replayed.zo.apply(step.projected_gradients, step.skipped)
        replayed.zo.subspace.scale_gradient(step.clip_factor)
        replayed.optimizer.step()
    assert [step.skipped for step in steps] == [False, True, False, False, False]
    _same(replayed, run, numbers=False)


def two_replicas_agree(combination: Combination) -> None:
    """Two ranks with their own rows, and two that share out the directions; the latter agree with one process, too."""
    alone = _after(combination, 3)
    for grid in (Grid(data=2), Grid(directions=2)):
        batches = (0, 1) if grid.data > 1 else (0, 0)
        first, second = _two_ranks(combination, grid, batches)
        _same(second, first)
        assert first.zo.forward_passes == second.zo.forward_passes == alone.zo.forward_passes
        if grid.directions > 1:
            _same(first, alone)


def forward_passes_are_counted(combination: Combination) -> None:
    """A row of the batch that is evaluated once counts once, however many share a call; with a tangent, twice."""
    for batched in (False, True):
        it = _with_probes_in_one_batch(combination) if batched else subject(combination)
        if it is None:
            continue
        rows = 0

        def count(_: nn.Module, args: tuple, output: Tensor) -> None:
            nonlocal rows
            rows += len(args[0]) * (1 if forward_ad.unpack_dual(output).tangent is None else 2)

        it.model.register_forward_hook(count)
        for _ in range(3):
            it.step()
            assert it.zo.forward_passes * ROWS == rows > 0


def has_plain_update(combination: Combination) -> bool:
    """Whether `the_update_is_along_what_was_probed` says anything; scales are factors, and move as exponentials."""
    return combination.rule == "none" and combination.subspace != "scales"


def the_update_is_along_what_was_probed(combination: Combination) -> None:
    """Under the plain rule: minus the learning rate times Σᵢ coefficientᵢ · zᵢ, with z as the probes showed it.

    Seen from outside: the answers of every layer to fixed inputs are affine in its parameters. Over two folds, so that the
    steps on which bases are redrawn are among them.
    """
    if not has_plain_update(combination):
        return
    it = subject(combination, dtype=torch.float64, lr=LEARNING_RATE, eps=0.1)
    for _ in range(5):
        before, _ = _answers(it.model)
        seen: list[tuple[Tensor, Tensor | None]] = []

        def closure(seen: list[tuple[Tensor, Tensor | None]] = seen) -> Tensor:
            seen.append(_answers(it.model))
            return it.loss()

        it.step(closure)
        z = _directions(seen, before, it.zo.estimator.probes())
        coefficients = it.zo.estimator.coefficients(it.numbers[-1])
        expected = -LEARNING_RATE * sum(coefficients[i] * z[i] for i in range(DIRECTIONS))
        moved = _answers(it.model)[0] - before
        assert moved.norm() > 0
        assert (moved - expected).norm() < 1e-9 * max(1.0, float(moved.norm()))


def a_loss_that_is_not_finite_writes_nothing(combination: Combination) -> None:
    """The step is skipped and counted, and the run goes on."""
    for bad in (math.nan, math.inf):
        it = subject(combination, fold_steps=0)  # a fold writes what was learned before
        it.step()
        before, state = it.bits(), _copied(it.optimizer.state_dict()["state"])
        for skipped, last in enumerate((False, True), start=1):
            calls = _Calls(it)
            it.zo.probe(calls)
            it.zo.discard()
            call = calls.count if last else 1
            estimate = it.zo.estimate(_Calls(it, {call: bad}))
            it.optimizer.step()
            assert not estimate.is_finite and it.zo.skipped_steps == skipped
        _same_weights(it, before)
        assert str(_copied(it.optimizer.state_dict()["state"])) == str(state)
        assert it.zo.estimate(it.loss).is_finite


CHECKS: dict[str, Callable[[Combination], None]] = {
    check.__name__: check
    for check in (
        probes_write_nothing,
        the_seed_decides,
        a_resumed_run_has_the_same_bits,
        its_numbers_replay,
        two_replicas_agree,
        forward_passes_are_counted,
        the_update_is_along_what_was_probed,
        a_loss_that_is_not_finite_writes_nothing,
    )
}


# What they share.


class _Calls:
    """A loss that counts how often it is asked for, with something else in place of some answers.

    Args:
        it: whose loss.
        instead: by call, counted from 1; an exception is raised, and a number multiplies the loss.
    """

    def __init__(self, it: Subject, instead: dict[int, Any] | None = None) -> None:
        self.it, self.instead, self.count = it, instead or {}, 0
        self.rows = ROWS

    def __call__(self) -> Tensor:
        return self._answer(self.it.loss())

    def batched(self, copies: int) -> Tensor:
        return self._answer(self.it.loss.batched(copies))

    def _answer(self, loss: Tensor) -> Tensor:
        self.count += 1
        instead = self.instead.get(self.count, 1.0)
        if isinstance(instead, BaseException):
            raise instead
        return loss * instead


def _with_probes_in_one_batch(combination: Combination) -> Subject | None:
    try:
        return subject(combination, batched=True)
    except ValueError:
        return None


def _coordinates(it: Subject) -> Tensor:
    return torch.cat([c.detach().flatten() for c in it.zo.subspace.coordinates.values()])


def _after(combination: Combination, steps: int, seed: int = 0, **options: Any) -> Subject:
    it = subject(combination, seed, **options)
    for _ in range(steps):
        it.step()
    return it


def _same_weights(it: Subject, before: dict[str, Tensor]) -> None:
    """All but what the rule remembers, which an estimate may change."""
    after = it.bits()
    weights = [name for name in before if "rule" not in name]
    assert_same_bits({n: after[n] for n in weights}, {n: before[n] for n in weights})


def _same(it: Subject, other: Subject, numbers: bool = True) -> None:
    assert not numbers or it.numbers == other.numbers
    assert_same_bits(it.bits(), other.bits())


def _copied(state: dict) -> dict:
    return {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()} for key, value in state.items()
    }


class _InTurn(Ranks):
    """A rank that runs in a thread of its own, one at a time: the next one's turn begins where one waits for it."""

    def __init__(self, grid: Grid, shared: _Shared) -> None:
        super().__init__(grid)
        self.shared = shared

    def all_gather(self, tensor: Tensor) -> Tensor:
        shared = self.shared
        shared.held[self.grid.rank] = tensor.clone()
        shared.turn.release()
        try:
            shared.all_here.wait()
            parts = torch.stack([shared.held[rank] for rank in range(self.grid.world_size)])
            shared.all_here.wait()  # nobody writes the next tensor before all have read this one
        finally:
            shared.turn.acquire()
        return parts


class _Shared:
    """Where two ranks meet."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.all_here = threading.Barrier(2, timeout=20)
        self.held: dict[int, Tensor] = {}


def _two_ranks(combination: Combination, grid: Grid, batches: tuple[int, int]) -> list[Subject]:
    """Three steps of two ranks."""
    shared = _Shared()
    ranks = [_InTurn(Grid(grid.data, grid.directions, rank), shared) for rank in range(2)]
    subjects = [subject(combination, ranks=r, batch=batch) for r, batch in zip(ranks, batches, strict=True)]
    errors: list[BaseException] = []

    def work(it: Subject) -> None:
        with shared.turn:
            try:
                for _ in range(3):
                    it.step()
            except BaseException as error:
                errors.append(error)
                shared.all_here.abort()

    threads = [threading.Thread(target=work, args=(it,)) for it in subjects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return subjects


def _answers(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of every layer, to inputs that show each of its parameters, in one vector; and its tangent, where there is one."""
    x = torch.eye(WIDTH, dtype=torch.float64, device=DEVICE)
    both = torch.cat((x, torch.zeros_like(x[:1])))
    with torch.no_grad():
        answers = [model.embed(torch.arange(TOKENS, device=DEVICE)), *(layer(both) for layer in model.layers)]
        answers += [model.norm(both), model.head(both)]
    return forward_ad.unpack_dual(torch.cat([answer.flatten() for answer in answers]))


def _directions(seen: list[tuple[Tensor, Tensor | None]], clean: Tensor, probes: list[Any]) -> dict[int, Tensor]:
    """z of every direction, as the probes showed it: an offset divided by its scale, or a tangent."""
    tangents = [tangent for _, tangent in seen if tangent is not None]
    if tangents:
        return dict(enumerate(tangents))
    found: dict[int, Tensor] = {}
    for (answers, _), probe in zip(seen, probes, strict=True):
        if not probe.scale:
            assert torch.equal(answers, clean)
            continue
        z = (answers - clean) / probe.scale
        assert torch.allclose(z, found.setdefault(probe.direction, z), atol=1e-9), "two directions under one number"
    return found
