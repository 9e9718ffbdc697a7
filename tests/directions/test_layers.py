"""A few layers in each step: which ones, that the others stay as they are, and that nothing is drawn for them."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from tests.conftest import (
    causal_batch,
    seeded,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_t5,
    weights_of,
)
from tests.subspaces.helpers import sgd
from tests.trainer.runs import config, with_lora
from zo_hf.directions import Layers
from zo_hf.directions.layers import layers_of
from zo_hf.directions.options import DirectionOptions
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Stream, draw
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full, LowRank


def layers_in(model: nn.Module) -> set[str]:
    return set(layers_of(model, dict(model.named_parameters())).values())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (tiny_llama, {"model.layers.0", "model.layers.1", "model.embed_tokens", "model.norm", "lm_head"}),
        (tiny_gpt2, {"transformer.h.0", "transformer.h.1", "transformer.wte", "transformer.wpe", "transformer.ln_f"}),
        (tiny_mixtral, {"model.layers.0", "model.layers.1", "model.embed_tokens", "model.norm", "lm_head"}),
        (
            tiny_opt,
            {f"model.decoder.{name}" for name in ("layers.0", "layers.1", "embed_tokens", "embed_positions")}
            | {"model.decoder.final_layer_norm"},
        ),
    ],
)
def test_blocks_are_layers_and_what_is_outside_of_them_too(build, expected: set[str]) -> None:
    assert layers_in(seeded(build)) == expected


def test_both_halves_of_an_encoder_decoder_have_blocks() -> None:
    found = layers_in(seeded(tiny_t5))
    assert {"encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "shared"} <= found
    assert not any(".layer." in name for name in found)
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"} <= layers_in(seeded(tiny_bert))
    adapter = with_lora(seeded(tiny_opt))
    names = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    layers = {name.removeprefix("base_model.model.model.decoder.") for name in layers_of(adapter, names).values()}
    assert layers == {"layers.0", "layers.1"}


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 1), (0.4, 2), (0.5, 2), (0.7, 4), (1.0, 5), (0.01, 1)])
def test_a_step_moves_its_share_of_the_layers(fraction: float, count: int) -> None:
    space = Full(seeded(tiny_llama))
    drawer = Layers(space.direction_context(2, DirectionOptions(active_layers=fraction)))
    for step in range(5):
        assert len(drawer.chosen(Stream(0, step, 1))) == count
        assert drawer.chosen(Stream(0, step, 0)) == drawer.chosen(Stream(0, step, 1))
        moving = sum(c.numel() for name, c in space.coordinates.items() if drawer.moves(Stream(0, step), name))
        assert drawer.moving(Stream(0, step), space.dimension) == moving


def test_all_layers_have_the_same_chance_independently_of_the_step_before() -> None:
    """E[z zᵀ] = a · I with a = 2/5."""
    drawer, steps = Layers(Full(seeded(tiny_llama)).direction_context(1, DirectionOptions(active_layers=0.4))), 3000
    chosen = [frozenset(drawer.chosen(Stream(5, step))) for step in range(steps)]
    for layer, count in Counter(layer for step in chosen for layer in step).items():
        assert abs(count / steps - 0.4) < 5 * (0.24 / steps) ** 0.5, layer
    pairs = Counter(chosen)
    assert len(pairs) == 10
    assert max(abs(count / steps - 0.1) for count in pairs.values()) < 5 * (0.09 / steps) ** 0.5
    same = sum(a == b for a, b in itertools.pairwise(chosen))
    assert abs(same / steps - 0.1) < 5 * (0.09 / steps) ** 0.5


@pytest.mark.parametrize("optimizer", ["seeded", "momentum", "adamw"])
def test_other_layers_keep_their_bits(optimizer: str) -> None:
    """Weight decay and a momentum move them neither, nor the factors of a fold to come."""
    model = seeded(tiny_llama)
    space = Full(model) if optimizer == "seeded" else LowRank(model, fold_steps=0)
    zo = ZerothOrder(model, space, direction="layers", active_layers=0.4, num_directions=2)
    groups = zo.coordinates(weight_decay=0.5)
    stepper = zo.prepare(
        {
            "seeded": lambda: SeededSGD(groups, space, lr=1e-2),
            "momentum": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2),
        }[optimizer]()
    )
    batch = causal_batch()
    for step in range(6):
        before = {name: c.detach().clone() for name, c in space.coordinates.items()}
        zo.estimate(lambda: model(**batch).loss)
        stepper.step()
        for name, coordinate in space.coordinates.items():
            assert (not torch.equal(coordinate, before[name])) == zo.distribution.moves(Stream(0, step), name), name


def test_full_draws_no_noise_for_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a probe nor in an update: that is what the method is faster by."""
    model, drawn = seeded(tiny_llama), set()
    for function in ("draw_slice", "draw_rows"):
        original = getattr(draw, function)
        monkeypatch.setattr(
            draw, function, lambda stream, name, *args, f=original: drawn.add(name) or f(stream, name, *args)
        )
    zo = ZerothOrder(model, "full", direction="layers", active_layers=0.4, batched_probes=False)
    optimizer = sgd(zo, lr=1e-3)
    batch = causal_batch()
    for step in range(4):
        moving = {name for name in zo.subspace.coordinates if zo.distribution.moves(Stream(0, step), name)}
        drawn.clear()
        with zo.subspace.at((Probe(0, 1e-3),), lambda index, step=step: Stream(0, step, index), zo.distribution):
            # The others' own forward runs: not even zeros are added.
            assert zo.subspace.moved(model.model.norm) == ("model.norm.weight" in moving)
        zo.estimate(lambda: model(**batch).loss)
        assert drawn == moving
        drawn.clear()
        optimizer.step()
        assert drawn == moving
    zo.finish()


def test_layers_of_the_first_step_alone_are_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(tiny_llama)
    batch = causal_batch()
    ZerothOrder(model, "full", direction="layers").estimate(lambda: model(**batch).loss)
    assert "not used" not in caplog.text


def test_probes_of_other_layers_compute_what_the_model_computes() -> None:
    model = seeded(tiny_llama)
    batch = causal_batch()
    zo = ZerothOrder(model, "full", direction="layers", active_layers=1.0, num_directions=1)
    everything = zo.estimate(lambda: model(**batch).loss).projected_gradients
    zo.finish()
    plain = ZerothOrder(model, "full", direction="gaussian", num_directions=1)
    assert plain.estimate(lambda: model(**batch).loss).projected_gradients == everything
    assert weights_of(model).keys()


# What is refused.


def test_one_layer_is_no_choice() -> None:
    model = seeded(tiny_llama)
    space = Full(model, target_modules=r"model\.layers\.1\..*")
    with pytest.raises(
        ValueError, match=r"^zo_direction='layers' .* in one, 'model.layers.1'; use zo_direction='gaussian'"
    ):
        ZerothOrder(model, space, direction="layers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zo_active_layers": 0.5}, r"zo_active_layers=0.5 has no effect with zo_direction='rademacher'"),
        ({"zo_direction": "layers", "zo_active_layers": 0.0}, r"zo_active_layers=0.0 must be a finite number above 0"),
        (
            {"zo_direction": "layers", "zo_active_layers": 1.5},
            r"zo_active_layers=1.5 must be a finite number above 0 and at most 1",
        ),
    ],
)
def test_fractions_that_are_none_are_refused(tmp_path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        config(tmp_path, **options)
