"""A model dispatched over several devices: accelerate's hooks move what flows between its parts, probes or not.

There is one device here. The hooks are accelerate's own all the same, and a hook that marks what it moves stands for a
second device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, weights_of
from tests.trainer.runs import logged, make_trainer, trained, with_lora
from zo_hf import ZerothOrder
from zo_hf.evaluation.model_loss import only_labeled_logits
from zo_hf.subspaces.subspace import _entered_forward

PARTS = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
PARTS |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


class Elsewhere(torch.Tensor):
    """A tensor on a device that is not there: what is computed from it stays on it."""


class Mover(ModelHook):
    """Moves the inputs of a module onto a device, or back, and counts its calls."""

    def __init__(self, there: bool) -> None:
        self.there = there
        self.calls: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls.append("pre")
        return moved(args, self.there), moved(kwargs, self.there)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls.append("post")
        return output


def moved(value: Any, there: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.as_subclass(Elsewhere if there else torch.Tensor)
    if isinstance(value, tuple | list):
        return type(value)(moved(v, there) for v in value)
    return {k: moved(v, there) for k, v in value.items()} if isinstance(value, dict) else value


def on_two_devices(model: nn.Module) -> dict[str, Mover]:
    """Hooks as `device_map` sets them, with the second decoder layer and what follows on the other device."""
    hooks = {}
    for name, _ in model.named_modules():
        if name.startswith(("model.layers.1", "model.norm", "lm_head")):
            hooks[name] = Mover(there=True)
        elif name and not name.startswith("model.layers.0.") and name != "model":
            hooks[name] = Mover(there=False)
    for name, hook in hooks.items():
        add_hook_to_module(model.get_submodule(name), hook, append=True)
    return hooks


def calls_of(hooks: dict[str, Mover]) -> dict[str, list[str]]:
    return {name: list(hook.calls) for name, hook in hooks.items()}


@pytest.fixture(params=["low_rank", "full", "adapter"])
def subspace(request: pytest.FixtureRequest) -> str:
    return request.param


def ready(subspace: str) -> nn.Module:
    model = seeded(tiny_llama)
    return with_lora(model) if subspace == "adapter" else model


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.mark.parametrize("batched", [False, True])
def test_a_probe_passes_the_hooks_that_a_plain_forward_passes(subspace: str, batched: bool) -> None:
    model = ready(subspace)
    hooks = on_two_devices(base_of(model))
    batch = causal_batch()
    with torch.no_grad():
        model(**batch)
    plain = calls_of(hooks)
    assert all(calls == ["pre", "post"] for calls in plain.values() if calls)
    assert sum(map(len, plain.values())) > 20

    zo = ZerothOrder(model, subspace, batched_probes=batched)
    seen = watch_devices(base_of(model))
    for hook in hooks.values():
        hook.calls.clear()
    probes = zo.estimator.probes()
    with zo.subspace.at(probes if batched else probes[:1], zo._stream, zo.distribution, rows=4), torch.no_grad():
        model(**{name: tensor.repeat(2, 1) for name, tensor in batch.items()} if batched else batch)
    assert calls_of(hooks) == plain
    there = {name: kind for name, kind in seen.items() if name.startswith(("model.layers.1", "lm_head"))}
    assert len(there) >= 7 and set(there.values()) == {Elsewhere}
    assert len(seen) > len(there) and {seen[name] for name in seen.keys() - there.keys()} == {torch.Tensor}


def watch_devices(model: nn.Module) -> dict[str, type]:
    """The kind of tensor that the engine's entry to every linear layer's forward is called with."""
    seen: dict[str, type] = {}

    def watched(name: str, entry: Callable, *args: Any, **kwargs: Any) -> Any:
        seen[name] = type(args[0])
        return entry(*args, **kwargs)

    for name, module in model.named_modules():
        table = module.__dict__
        for key in ("_old_forward", "forward") if isinstance(module, nn.Linear) else ():
            if isinstance(table.get(key), functools.partial) and table[key].func is _entered_forward:
                table[key] = functools.partial(watched, name, table[key])
    return seen


def test_training_a_dispatched_model_is_training_it(tmp_path: Path, subspace: str) -> None:
    options = {"zo_subspace": subspace, "learning_rate": 1e-4, "max_steps": 7}
    plain = trained(tmp_path / "plain", ready(subspace), **options)
    model = ready(subspace)
    dispatch_model(base_of(model), PARTS, force_hooks=True)
    forwards = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert any("_hf_hook" in table for table in forwards.values())
    trainer = trained(tmp_path / "dispatched", model, **options)
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert_same_bits(weights_of(model), weights_of(plain.model))
    for name, module in model.named_modules():
        for key in ("_old_forward", "forward", "_hf_hook"):
            assert module.__dict__.get(key) is forwards[name].get(key), (name, key)


def test_a_model_on_several_devices_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stay(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("moved")

    model = seeded(tiny_llama)
    hooks = on_two_devices(model)
    model.hf_device_map = {name: int(hook.there) for name, hook in hooks.items()}
    monkeypatch.setattr(model, "to", stay, raising=False)
    trainer = make_trainer(tmp_path, model, learning_rate=1e-4)
    trainer.train()
    assert trainer.is_model_parallel and not trainer.place_model_on_device
    assert logged(trainer, "loss") == logged(trained(tmp_path, seeded(tiny_llama), learning_rate=1e-4), "loss")


def test_logits_are_not_picked_by_positions_on_another_device() -> None:
    model, batch = seeded(tiny_llama), causal_batch()
    assert "logits_to_keep" in only_labeled_logits(model, batch)
    model.lm_head.to("meta")
    assert "logits_to_keep" not in only_labeled_logits(model, batch)
