"""A model whose weights are on the disk trains with the bits of the same model in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.conftest import (
    assert_same_bits,
    causal_batch,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_t5,
    translation_batch,
    weights_of,
)
from tests.offload.models import WAYS, in_memory, on_disk, saved, values_of
from tests.trainer.runs import At, logged, make_trainer, trained
from zo_hf import ZerothOrder
from zo_hf.offload import get_peft_model, offloaded_weights

RUN: dict[str, Any] = {"max_steps": 8, "zo_fold_steps": 3, "learning_rate": 1e-2}


def assert_same_run(folder: Path, way: Any, base: Path, **options: Any) -> nn.Module:
    """Compare the losses and the weights of a run with those of the same run in memory; returns the trained model."""
    plain = trained(folder / "plain", in_memory(base), **RUN | options)
    offloaded = trained(folder / "offloaded", way(base), **RUN | options)
    assert logged(offloaded, "loss") == logged(plain, "loss")
    assert_same_bits(values_of(offloaded.model), weights_of(plain.model))
    return offloaded.model


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_offload_gives_the_same_bits(tmp_path: Path, way: str) -> None:
    model = assert_same_run(tmp_path, WAYS[way], saved(tmp_path / "base"))
    assert all(parameter.is_meta for parameter in model.model.decoder.layers.parameters())


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(tiny_llama, torch.bfloat16), (tiny_gpt2, torch.float32), (tiny_mixtral, torch.bfloat16)],
    ids=["llama", "gpt2", "mixtral"],
)
def test_every_architecture_does(tmp_path: Path, build: Any, dtype: torch.dtype) -> None:
    assert_same_run(tmp_path, on_disk, saved(tmp_path / "base", build, dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"zo_subspace": "core", "zo_rank": 4},
        {"zo_subspace": "norms", "zo_fold_steps": None},
        {"zo_rows_per_direction": 0, "optim": "adamw_torch", "weight_decay": 0.1},
        {"zo_basis": "activation"},
        {"zo_preconditioner": "inputs"},
        {"zo_target_modules": r".*layers[.]1[.].*", "zo_feature_cache_gib": 1.0},
        {"zo_rule": "curvature", "zo_estimator": "second_difference"},
        {"bf16": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: ",".join(map(str, options)),
)
def test_every_part_of_a_step_does(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_same_run(tmp_path, on_disk, saved(tmp_path / "base"), **options)


def test_two_stacks_of_layers_do(tmp_path: Path) -> None:
    base, batch = saved(tmp_path / "base", tiny_t5), translation_batch()
    found = []
    for model in (in_memory(base), on_disk(base)):
        zo = ZerothOrder(model, "low_rank", fold_steps=2, seed=0)
        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2))
        losses = []
        for _ in range(5):
            losses.append(zo.estimate(lambda model=model: model(**batch).loss).loss)
            optimizer.step()
        found.append((losses, values_of(zo.finish())))
    assert found[0][0] == found[1][0]
    assert_same_bits(found[1][1], found[0][1])


@pytest.mark.parametrize("buffers", [False, True])
def test_a_plain_module_with_buffers_does(buffers: bool) -> None:
    x, y = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for way in (lambda model: model, lambda model: cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)):
        model = way(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Tanh())))
        zo = ZerothOrder(model, "low_rank", fold_steps=2, seed=0)
        optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2))
        losses = []
        for _ in range(5):
            losses.append(zo.estimate(lambda model=model: (model(x) - y).square().mean()).loss)
            optimizer.step()
        found.append((losses, values_of(zo.finish())))
    assert found[0][0] == found[1][0]
    assert_same_bits(found[1][1], found[0][1])


def lora(model: nn.Module, wrap: Any) -> nn.Module:
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return wrap(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_alpha=8))


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_around_them_does(tmp_path: Path, way: str) -> None:
    import peft

    base = saved(tmp_path / "base", num_hidden_layers=3)
    plain = trained(tmp_path / "plain", lora(in_memory(base), peft.get_peft_model), **RUN)
    offloaded = trained(tmp_path / "offloaded", lora(WAYS[way](base), get_peft_model), **RUN)
    assert logged(offloaded, "loss") == logged(plain, "loss")
    assert_same_bits(values_of(offloaded.model), weights_of(plain.model))
    offloaded.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(in_memory(base), tmp_path / "saved")
    assert_same_bits(weights_of(again), weights_of(plain.model))


def test_an_adapter_of_a_parameter_does(tmp_path: Path) -> None:
    """PEFT computes such a parameter anew inside of the layer, which then holds no tensor of its name."""
    import peft

    base, ends = saved(tmp_path / "base", tiny_mixtral), []
    for way, wrap in ((in_memory, peft.get_peft_model), (on_disk, get_peft_model)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
            model = wrap(way(base), config)
        ends.append(trained(tmp_path / way.__name__, model, **RUN))
    assert logged(ends[1], "loss") == logged(ends[0], "loss")
    assert_same_bits(values_of(ends[1].model), weights_of(ends[0].model))


def test_an_adapter_that_was_offloaded_comes_into_memory(tmp_path: Path) -> None:
    import peft
    from accelerate import disk_offload

    base = saved(tmp_path / "base")
    plain = trained(tmp_path / "plain", lora(in_memory(base), peft.get_peft_model), **RUN)
    model = lora(in_memory(base), peft.get_peft_model)
    disk_offload(model.get_base_model(), tmp_path / "offload", execution_device=torch.device("cpu"))
    offloaded = trained(tmp_path / "offloaded", model, **RUN)
    assert logged(offloaded, "loss") == logged(plain, "loss")
    assert_same_bits(values_of(offloaded.model), weights_of(plain.model))


def test_whoever_looks_sees_the_present_weights(tmp_path: Path) -> None:
    """The state dict, a checkpoint, a generated answer and an evaluation, at a fold and between two."""
    base, prompt = saved(tmp_path / "base"), causal_batch(rows=2)["input_ids"]

    def look(state: Any, model: nn.Module, **_: Any) -> Any:
        answer = model.generate(prompt, max_new_tokens=3, do_sample=False)
        return answer, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    seen = []
    for way in (in_memory, on_disk):
        looks = At({3, 5}, look)
        options = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3e-2}
        trainer = trained(tmp_path / way.__name__, way(base), more={"callbacks": [looks]}, **RUN | options)
        seen.append((looks.results, logged(trainer, "eval_loss"), trainer.evaluate()["eval_loss"]))
    assert seen[0][1:] == seen[1][1:]
    for (answer, state), (other, of_disk) in zip(seen[0][0], seen[1][0], strict=True):
        assert torch.equal(answer, other)
        assert_same_bits(of_disk, state)


def test_a_model_that_has_been_used_is_still_tied(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_opt)

    def used(folder: Path) -> nn.Module:
        model = on_disk(folder)
        with torch.no_grad():
            model(**causal_batch())
        assert model.lm_head.weight is not model.model.decoder.embed_tokens.weight  # accelerate has replaced both
        return model

    model = assert_same_run(tmp_path, used, base)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_files_of_the_model_stay_as_they_are_and_nothing_else_stays(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_mixtral)  # transformers writes its experts into the offload folder
    model = on_disk(base)
    files = {path: path.read_bytes() for folder in (base, tmp_path / "offload") for path in folder.iterdir()}
    trainer = make_trainer(tmp_path / "run", model, **RUN)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert any(weight.writes for weight in offloaded_weights(trainer.model).values())
    trainer.model.save_pretrained(tmp_path / "saved")  # transformers' own, which reads what accelerate's hooks hold
    trainer.save_model(str(tmp_path / "saved by the trainer"))
    assert_same_bits(weights_of(in_memory(tmp_path / "saved")), values_of(trainer.model))
    assert_same_bits(weights_of(in_memory(tmp_path / "saved by the trainer")), values_of(trainer.model))
    assert {path: path.read_bytes() for folder in (base, tmp_path / "offload") for path in folder.iterdir()} == files


def test_a_second_training_goes_on_from_the_first(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    ends = []
    for way in (in_memory, on_disk):
        trainer = make_trainer(tmp_path / way.__name__, way(base), **RUN)
        trainer.train()
        trainer.evaluate()
        trainer.train()
        ends.append(values_of(trainer.model))
    assert_same_bits(ends[1], ends[0])


def test_a_probe_writes_nothing_and_an_error_in_it_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = on_disk(saved(tmp_path / "base"))
    before, tables = values_of(model), {module: dict(module.__dict__) for module in model.modules()}
    zo = ZerothOrder(model, "low_rank", seed=0)
    batch = causal_batch()
    zo.estimate(lambda: model(**batch).loss)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.decoder.layers[1].fc1.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        zo.estimate(lambda: model(**batch).loss)
    handle.remove()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same_bits(values_of(model), before)
    zo.subspace.detach()
    for module, table in tables.items():
        for key in ("_old_forward", "forward", "_hf_hook"):
            assert module.__dict__.get(key) is table.get(key)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, in_memory(tmp_path / "base")(**batch).loss)
    assert os.listdir(tmp_path) == ["base"] or not any((tmp_path / "offload").iterdir())
