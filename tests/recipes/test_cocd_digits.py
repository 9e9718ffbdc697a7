"""The recipe of coordinate descent on digits: its networks, its shortcut for single weights, and runs of few steps."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.conftest import assert_same_bits, weights_of
from zo_hf import ZerothOrder
from zo_hf.subspaces import FullInMemory


def network() -> nn.Module:
    from common.resnet20 import ResNet20

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet20()
        for module in model.modules():  # norms begin at 1 and 0, at which mistakes would not show
            if isinstance(module, nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, 1, 8, 8, generator=generator), torch.randint(10, (rows,), generator=generator)


def written_out(model: nn.Module, x: Tensor) -> Tensor:
    """ResNet-20 a second time, as its paper has it, with a strided identity and zeros as the shortcut."""
    x = model.norm(model.conv(x)).relu()
    for index, block in enumerate(model.blocks):
        y = block.norm_2(block.conv_2(block.norm_1(block.conv_1(x)).relu()))
        if index in (3, 6):
            kept = x[:, :, ::2, ::2]
            x = torch.cat([kept, torch.zeros_like(kept)], dim=1)
        x = (x + y).relu()
    return model.linear(x.flatten(2).mean(-1))


def test_resnet_20_has_the_size_and_the_form_of_its_paper() -> None:
    from common.resnet20 import ResNet20

    assert sum(p.numel() for p in ResNet20(channels=3).parameters()) == 269_722
    model, (pictures, _) = network(), batch()
    assert sum(p.numel() for p in model.parameters()) == 269_434
    assert [tuple(block.conv_2.weight.shape[:2]) for block in model.blocks] == [
        (width, width) for width in (16, 32, 64) for _ in range(3)
    ]
    torch.testing.assert_close(model(pictures), written_out(model, pictures), rtol=1e-4, atol=1e-4)
    large = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(large), written_out(model, large), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_losses_of_single_weights_are_those_of_the_whole_network(recipe: ModuleType) -> None:
    """In every parameter, at both ends of it and between, with moves of both signs."""
    from common.single_weights import SingleWeightLosses

    model, (pictures, labels) = network(), batch()
    zo = ZerothOrder(model, FullInMemory(model), estimator="coordinate", num_directions=4)
    loss = SingleWeightLosses(zo, model, pictures, labels)
    inputs = loss._inputs()
    loss._make_matrices(inputs)
    parameters = dict(model.named_parameters())
    clean = F.cross_entropy(model(pictures), labels)
    moves = torch.tensor([0.7, -0.7, 0.4])
    for name, parameter in parameters.items():
        elements = torch.tensor([0, parameter.numel() // 2, parameter.numel() - 1])
        expected = []
        for element, move in zip(elements, moves, strict=True):
            moved = parameter.clone()
            moved.view(-1)[element] += move
            outputs = functional_call(model, parameters | {name: moved}, (pictures,))
            expected.append(F.cross_entropy(outputs, labels))
        found = loss._moved(name, elements, moves, inputs)
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=3e-6)
        assert (found - clean).abs().max() > 1e-4, name


@pytest.mark.parametrize(("estimator", "order"), [("coordinate", "cyclic"), ("coordinate_forward", "permuted")])
def test_a_step_has_the_numbers_of_the_engines_own_probes(recipe: ModuleType, estimator: str, order: str) -> None:
    from common.single_weights import SingleWeightLosses

    pictures, labels = batch()
    numbers = []
    for shortcut in (True, False):
        model = network()
        before = weights_of(model)
        options = {"estimator": estimator, "coordinate_order": order, "num_directions": 160}
        zo = ZerothOrder(model, FullInMemory(model), eps=0.05, batched_probes=False, **options)
        own = SingleWeightLosses(zo, model, pictures, labels)
        loss = own if shortcut else lambda own=own: own()
        estimate = zo.estimate(loss)
        assert_same_bits(weights_of(model), before)
        numbers.append(torch.tensor(estimate.projected_gradients))
        assert zo.forward_passes == (320 if estimator == "coordinate" else 161)
        assert not zo.subspace.still, "all weights are read"
    torch.testing.assert_close(numbers[0], numbers[1], rtol=0, atol=1e-4)
    assert numbers[0].abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"rule": "none"}, {"rule": "cocd", "cocd_decay": 0.9}])
@pytest.mark.parametrize("order", ["cyclic", "permuted"])
def test_a_descent_along_slopes_takes_the_steps_of_the_engine(
    recipe: ModuleType, order: str, options: dict[str, Any]
) -> None:
    """With a rate of its own for the last layer, for more than two cycles."""
    from common.coordinate_descents import EngineDescent, SlopeDescent
    from common.coordinate_studies import Method

    options = {"estimator": "coordinate_forward", "num_directions": 46, "coordinate_order": order} | options
    method = Method(options, (0.3,), 1e-6, 0, 8, of_linear=0.25)
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.rand(8, 6, generator=generator).double(), torch.arange(8) % 4) for _ in range(6)]
    ends = []
    for slopes in (False, True):
        model = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), relu=nn.ReLU(), linear=nn.Linear(8, 4))).double()
        for index, parameter in enumerate(model.parameters()):
            nn.init.uniform_(parameter, -1, 1, generator=torch.Generator().manual_seed(index))
        before = weights_of(model)
        descent = SlopeDescent(model, method, 0.3, 5) if slopes else EngineDescent(model, method, 0.3, 1e-6, 5)
        coherence = []
        for pictures, labels in batches:
            descent.take_step(pictures, labels)
            coherence.append(descent.coherence())
        moved = torch.cat([(after - before[name]).flatten() for name, after in model.named_parameters()])
        ends.append((moved.detach(), coherence, descent.forward_passes, descent.steps, descent.coordinates))
    (of_engine, *engine), (of_slopes, *along_slopes) = ends
    torch.testing.assert_close(of_slopes, of_engine, rtol=1e-4, atol=1e-6)
    assert of_engine.abs().max() > 0.1
    assert engine[1:] == along_slopes[1:] == [6 * 47, 6, 92]
    if options["rule"] == "cocd":
        assert along_slopes[0][-1] == pytest.approx(engine[0][-1], abs=1e-4)


def test_runs_are_made_once_and_drawn(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = recipe.STUDIES["mlp"]
    names = ("BCCD (γ = 0)", "CoCD γ = 0.99")
    few = {
        name: replace(
            study.methods[name],
            options=study.methods[name].options | {"num_directions": 200},
            rates=(0.01, 1e30),
            forwards=400 * 8,
        )
        for name in names
    }
    study = replace(study, make=lambda: nn.Linear(64, 10), methods=few, ablated=("CoCD γ = 0.99", (1.0,)))
    monkeypatch.setitem(recipe.STUDIES, "mlp", study)
    in_this_process(recipe, monkeypatch)
    words = ["recipe", "--methods", *names, "--seeds", "0", "1", "--processes", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    recipe.main()
    table = capsys.readouterr().out
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 2 * 2 + 2 + 2, "two rates each, another seed of the better one, and another distance"
    assert all(run["steps"] == 8 for run in runs if run["learning_rate"] == 0.01)
    of_cocd = next(run for run in runs if run["method"] == names[1] and run["learning_rate"] == 0.01)
    of_bccd = next(run for run in runs if run["method"] == names[0])
    assert len(of_cocd["coherence"]) == 5 and of_bccd["coherence"] == [], "the second cycle begins in step 3 of 8"
    assert "| CoCD γ = 0.99 | 0.01 | 2 | 3,200 | 2.5 | " in table and "| ε = 1 | " in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"digits.png", "coherence.png"}
    monkeypatch.setattr(recipe, "train", lambda _: pytest.fail("the runs are there"))
    recipe.main()


def test_one_network_does_not_write_over_the_table_of_another(recipe: ModuleType) -> None:
    assert len({recipe.arguments(["--network", network]).output for network in recipe.STUDIES}) == len(recipe.STUDIES)


def test_no_more_runs_are_submitted_than_there_are_processes(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an interrupted comparison has no runs left that its processes go on with."""
    submitted = in_this_process(recipe, monkeypatch)

    def stop(settings: dict) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train", stop)
    comparison = recipe.Comparison(recipe.arguments(["--processes", "2", "--output", str(tmp_path)]))
    with pytest.raises(KeyboardInterrupt):
        comparison.tune()
    assert len(submitted) == 2


def in_this_process(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Make the runs without the processes, which would not see a changed table of methods; return their settings."""
    from concurrent.futures import Future

    submitted: list[dict] = []

    class Pool:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, function, settings) -> Future:
            submitted.append(settings)
            future: Future = Future()
            try:
                future.set_result(function(settings))
            except BaseException as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(recipe, "ProcessPoolExecutor", Pool)
    return submitted
