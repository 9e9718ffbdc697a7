"""One call of a module with parameters of every group of rows, beside a call per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.conftest import causal_batch, seeded, tiny_gpt2, tiny_llama, tiny_opt
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.subspaces import adapter, per_group
from zo_hf.subspaces.functional import functional_call

GROUPS, SIZE, WIDTH = 3, 2, 8


class Reversed(nn.Module):
    """A module whose output depends on the place of an element of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.flip(0)


Reversed.forward.__module__ = "transformers.stand_in"  # it may then be tried


MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "LayerNorm": (partial(nn.LayerNorm, WIDTH), True),
    "LayerNorm without bias": (partial(nn.LayerNorm, WIDTH, bias=False), True),
    "RMSNorm": (partial(nn.RMSNorm, WIDTH), True),
    "LlamaRMSNorm": (partial(LlamaRMSNorm, WIDTH), True),
    "GemmaRMSNorm": (partial(GemmaRMSNorm, WIDTH), True),
    "Reversed": (Reversed, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimensions", [2, 3, 4])
@pytest.mark.parametrize("name", MODULES)
def test_one_call_gives_what_a_call_per_group_gives(
    name: str, dimensions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, in_one_call = MODULES[name]
    module = build().to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(GROUPS * SIZE, *[5] * (dimensions - 2), WIDTH, generator=generator).to(dtype)
    stacked = {key: 1 + torch.randn(GROUPS, WIDTH, generator=generator) for key in module._parameters}
    stacked = {key: value for key, value in stacked.items() if module._parameters[key] is not None}
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return functional_call(*args)

    def parameters(group: int) -> dict[str, torch.Tensor]:
        return {key: value[group] for key, value in stacked.items()}

    expected = torch.cat([functional_call(module, parameters(g), (x[g * SIZE :][:SIZE],), {}) for g in range(GROUPS)])
    call = partial(per_group.functional_call_per_group, module, parameters, GROUPS, SIZE, (x,), {}, lambda: stacked)
    call()  # the first call of a class compares both ways
    monkeypatch.setattr(per_group, "functional_call", counted)
    found = call()
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    assert (len(calls) < GROUPS) == in_one_call


@pytest.mark.parametrize("kind", ["lora", "both factors", "rslora", "dora", "lora with biases"])
@pytest.mark.parametrize("build", [tiny_opt, tiny_llama, tiny_gpt2])
def test_factors_of_groups_give_the_outputs_of_a_call_per_group(
    build: Callable[[], nn.Module], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "lora with biases": {"lora_bias": True}}
    config = peft.LoraConfig(r=2, target_modules="all-linear", **options.get(kind, {}))
    model = peft.get_peft_model(seeded(build), config)
    zo = ZerothOrder(model, "adapter", eps=1e-2, target_modules=".*lora.*" if kind == "both factors" else None)
    batch = causal_batch(GROUPS * SIZE)
    batch.pop("labels")
    calls: list[int] = []
    original = per_group._linear

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(per_group, "_linear", counted)
    probes = [Probe(group, 1e-2) for group in range(GROUPS)]

    def logits() -> torch.Tensor:
        with torch.no_grad(), zo.subspace.at(probes, zo._stream, zo.distribution, rows=SIZE):
            return model(**batch).logits

    found = logits()
    # DoRA's layer reads its factors itself.
    assert bool(calls) == (kind != "dora")
    monkeypatch.setattr(
        adapter, "functional_call_per_group", lambda *args: per_group.functional_call_per_group(*args[:6])
    )
    expected = logits()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:SIZE], found[SIZE : 2 * SIZE], atol=1e-4)


def test_a_model_without_values_decides_nothing_for_those_that_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_group, "_BROADCASTS", {})
    with torch.device("meta"):
        planned = LlamaRMSNorm(WIDTH)
    per_group.compare_ahead(planned, dict(planned.named_parameters()))
    assert not per_group._BROADCASTS
    module = LlamaRMSNorm(WIDTH)
    per_group.compare_ahead(module, dict(module.named_parameters()))
    assert set(per_group._BROADCASTS.values()) == {True}
    per_group.compare_ahead(module, {})  # a module of which nothing moves


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_torch_func_may_map_a_norm_over_positions(kind: type[nn.Module]) -> None:
    """vmap has no rule for an operation that writes into a given tensor."""
    module, generator = kind(WIDTH), torch.Generator().manual_seed(1)
    x = torch.randn(GROUPS * SIZE, 5, WIDTH, generator=generator)
    stacked = {key: 1 + torch.randn(GROUPS, WIDTH, generator=generator) for key in module._parameters}

    def called(part: torch.Tensor) -> Any:
        return per_group._in_one_call(module, stacked, part)

    torch.testing.assert_close(torch.func.vmap(called, in_dims=1, out_dims=1)(x), called(x))


class Both(NamedTuple):
    x: torch.Tensor
    half: torch.Tensor


@dataclass
class Outputs:
    x: torch.Tensor


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor


class Returns(nn.Linear):
    """A linear layer that returns what it has computed in a container."""

    def __init__(self, container: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(WIDTH, WIDTH)
        self.container = container

    def forward(self, x: torch.Tensor) -> Any:
        return self.container(super().forward(x))


def test_outputs_of_own_classes_are_concatenated_or_refused() -> None:
    """They were those of the first group alone, or an error of the class."""
    x, parameters = (
        torch.randn(GROUPS * SIZE, WIDTH),
        [{"bias": torch.full((WIDTH,), float(g))} for g in range(GROUPS)],
    )

    def of(module: nn.Module) -> Any:
        return per_group.functional_call_per_group(module, parameters.__getitem__, GROUPS, SIZE, (x,), {})

    layer = Returns(lambda y: Both(y, y / 2))
    both = of(layer)
    expected = torch.cat([x[g * SIZE : (g + 1) * SIZE] @ layer.weight.T + g for g in range(GROUPS)])
    assert type(both) is Both and torch.allclose(both.x, expected) and torch.allclose(both.half, expected / 2)
    with pytest.raises(NotBatchable, match="returns a Outputs"):
        of(Returns(Outputs))


@pytest.mark.parametrize(
    "container", [Outputs, Slotted, lambda y: Both(y, y), lambda y: BaseModelOutput(last_hidden_state=y)]
)
def test_a_layer_in_half_precision_returns_what_it_returns_without_a_probe(
    container: Callable[[torch.Tensor], Any],
) -> None:
    layer = Returns(container).bfloat16()
    moved = {"bias": torch.zeros(WIDTH)}
    output = functional_call(layer, moved, (torch.ones(2, WIDTH, dtype=torch.bfloat16),), {})
    assert type(output) is type(container(torch.ones(1)))
    values = output if isinstance(output, tuple) else [getattr(output, field.name) for field in fields(output)]
    assert {value.dtype for value in values if value is not None} == {torch.bfloat16}
