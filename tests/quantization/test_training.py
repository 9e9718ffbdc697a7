"""ZOTrainer with a quantized model, in every way and format: what moves, what is saved, what continues and replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from tests.conftest import assert_same_bits, tiny_opt
from tests.quantization import runs
from tests.quantization.runs import (
    ADAPTERS,
    CASES,
    KINDS,
    QUICK,
    SETUPS,
    held,
    load,
    loss_of,
    model_for,
    run,
    saved_model,
    trainer_for,
    write_base,
)
from tests.quantized_models import decoded, parts_of
from tests.trainer.runs import SaveAt, logged, make_trainer, trained
from tests.trainer.test_trainer_features import fake_hub
from zo_hf import ZOTrainer
from zo_hf.checkpoint import BASE_FILE
from zo_hf.cli import main as cli
from zo_hf.quantization import quantized_layers
from zo_hf.trajectory import replay

EVERY_CASE = pytest.mark.parametrize(("way", "kind"), CASES)
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
BEST |= {"save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Without the names that PEFT puts around a layer's."""
    parts = parts_of(model).items()
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): part for name, part in parts}


@EVERY_CASE
def test_only_what_is_meant_to_move_moves(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    trainer = trainer_for(tmp_path, way, base, kind)
    before = codes_of(trainer.model)
    trainer.train()
    after = codes_of(trainer.model)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    codes = {name for name in before if name.endswith(("weight", "qdata"))}
    assert len(codes) == 7 and isinstance(trainer.model, PeftModel) == (way in ADAPTERS)
    if way in ("folds", "core"):
        assert changed & codes
        assert all(error > 0 for error in logged(trainer, "zo/fold_error")) and logged(trainer, "zo/fold_error")
    elif way == "scales":
        assert changed and not changed & codes
    else:
        assert not changed


@EVERY_CASE
def test_what_is_saved_has_the_same_loss_to_the_last_bit(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    """The final model, and the best checkpoint, which is loaded back at the end."""
    trainer = run(tmp_path / "run", way, base, kind, **BEST)
    final = trainer.evaluate()["eval_loss"]
    assert final == trainer.predict(trainer.eval_dataset).metrics["test_loss"]
    trainer.save_model(str(tmp_path / "final"))
    best = Path(str(trainer.state.best_model_checkpoint))
    for folder in (tmp_path / "final", best):
        assert loss_of(tmp_path / "other", saved_model(folder, way, base, kind)) == final
    # What the trainer saw at that step was the same model, its changes not yet rounded into the weights.
    seen = min(logged(trainer, "eval_loss")[:-1])
    assert final == pytest.approx(seen, rel=2e-2 if way in ("folds", "core", "scales") else 2e-3)


@EVERY_CASE
def test_resuming_ends_with_the_same_bits(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    """From a checkpoint at a fold and from one between two; and the log of the run replays to the same."""
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 5}
    saving = {"more": {"callbacks": [SaveAt(3, 4)]}}
    whole = run(tmp_path / "whole", way, base, kind, **options, **saving)
    expected = held(whole.model)
    for step in (3, 4) if way in ("folds", "core") else (4,):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = run(tmp_path / f"from{step}", way, base, kind, resume=checkpoint, **options)
        assert_same_bits(held(resumed.model), expected)
        for key in ("loss", "zo/projected_grad"):
            assert logged(resumed, key)[step:] == logged(whole, key)[step:], key
    replayed = replay(model_for(way, base, kind), tmp_path / "whole")
    assert_same_bits(held(replayed), expected)


LEARNING = {"adapter": 3e-2, "factors": 3e-3, "folds": 3e-3, "core": 3e-3, "scales": 0.1, "norms": 0.1}


@pytest.mark.parametrize(("way", "kind"), [*((way, "int8") for way in SETUPS), ("folds", "nf4"), ("scales", "nf4")])
def test_the_loss_falls(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    options = {"max_steps": 60, "learning_rate": LEARNING[way], "zo_num_directions": 2, "zo_normalize": True}
    trainer = trainer_for(tmp_path, way, base, kind, **options | {"logging_steps": 20})
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


@pytest.mark.parametrize(("way", "kind"), [(way, kind) for way, kind in QUICK if kind != "torchao"])
def test_bfloat16_models(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    """Trained, saved and loaded; c is not nothing, which it would be if the probes' difference were rounded away."""
    trainer = run(tmp_path, way, base, kind, dtype=torch.bfloat16, zo_num_directions=4, max_steps=3)
    assert all(logged(trainer, "zo/projected_grad"))
    trainer.save_model(str(tmp_path / "final"))
    loaded = saved_model(tmp_path / "final", way, base, kind, torch.bfloat16)
    assert loss_of(tmp_path / "other", loaded) == trainer.evaluate()["eval_loss"]


# What is on the disk.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["folds", "scales", "norms"])
def test_eight_bits_stay_eight_bits_on_the_disk(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    trainer = run(tmp_path, way, base, kind, max_steps=4)
    trainer.save_model(str(tmp_path / "final"))
    with safe_open(tmp_path / "final" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    codes = {name for name in dtypes if "_proj" in name and name.endswith(("proj.weight", "qdata"))}
    assert len(codes) == 7
    assert {dtypes[name] for name in codes} == {"U8" if kind.startswith("nf4") else "I8"}
    load(base, kind).save_pretrained(tmp_path / "before")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "final")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_checkpoint_of_factors_is_an_adapter_and_small(tmp_path: Path, base: Path, kind: str) -> None:
    run(tmp_path, "factors", base, kind, save_strategy="steps", save_steps=2, max_steps=2)
    names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "zo_state.json"} <= names
    assert not names & {"model.safetensors", BASE_FILE}


@pytest.mark.parametrize("kind", ["int8", "nf4 nested"])
def test_a_checkpoint_of_scales_holds_the_codes_once(tmp_path: Path, base: Path, kind: str) -> None:
    run(tmp_path, "scales", base, kind, save_strategy="steps", save_steps=2, max_steps=2)
    with safe_open(tmp_path / "checkpoint-2" / BASE_FILE, "pt") as file:
        names = set(file.keys())
    assert names and not {name for name in names if name.endswith("proj.weight")}


def test_checkpoints_of_factors_are_pushed_as_adapters(tmp_path: Path, base: Path, monkeypatch: Any) -> None:
    uploads = fake_hub(monkeypatch)
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 2}
    trainer = run(tmp_path / "tiny", "factors", base, "int8", max_steps=2, **options)
    trainer.push_to_hub(commit_message="End of training")
    folders = {path: names for _, _, path, names in uploads if path}
    assert set(folders) == {"checkpoint-2"}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= folders["checkpoint-2"]
    assert {"README.md", "adapter_model.safetensors"} <= uploads[-1][3] and "model.safetensors" not in uploads[-1][3]


# The command.


@pytest.mark.parametrize(
    ("way", "kind"),
    [(way, kind) for way in SETUPS for kind in KINDS if kind == KINDS[-1] or way in ("factors", "folds")],
)
def test_the_command_replays_onto_a_quantized_base(tmp_path: Path, base: Path, way: str, kind: str) -> None:
    trainer = run(tmp_path / "out", way, base, kind, max_steps=4)
    expected = trainer.evaluate()["eval_loss"]
    cli.main(["replay", str(tmp_path / "out"), "--model", str(base), "--output", str(tmp_path / "tuned")])
    assert loss_of(tmp_path / "other", saved_model(tmp_path / "tuned", way, base, kind)) == expected


# What must go on working.


def test_a_restart_with_a_smaller_batch_begins_the_factors_again(tmp_path: Path, base: Path) -> None:
    """With half the batch from the first step on, as if it had been asked for; the adapter is one and no other."""

    class Tight(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["input_ids"]) == 8 and self.state.global_step == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"max_steps": 4, "learning_rate": 1e-3, "zo_batched_probes": False, **SETUPS["factors"]}
    restarted = make_trainer(tmp_path / "a", load(base, "int8"), Tight, auto_find_batch_size=True, **options)
    restarted.train()
    smaller = restarted._train_batch_size
    assert smaller < 8
    direct = make_trainer(tmp_path / "b", load(base, "int8"), Tight, per_device_train_batch_size=smaller, **options)
    direct.train()
    assert_same_bits(held(restarted.model), held(direct.model))
    assert not any("forward" in vars(module) for module in restarted.model.modules())


@pytest.mark.parametrize("way", ["factors", "folds", "scales"])
def test_a_checkpoint_of_a_trajectory_alone_resumes(tmp_path: Path, base: Path, way: str) -> None:
    options = {"save_only_trajectory": True, "max_steps": 5}
    whole = run(tmp_path, way, base, "nf4", more={"callbacks": [SaveAt(4)]}, **options)
    resumed = run(tmp_path, way, base, "nf4", resume=str(tmp_path / "checkpoint-4"), **options)
    assert_same_bits(held(resumed.model), held(whole.model))


@pytest.mark.parametrize(
    ("way", "compute"),
    [("folds", "int8"), ("folds", "nf4"), ("folds", "nf4 in bf16"), ("norms", "int8"), ("factors", "nf4 in bf16")],
)
def test_a_model_with_biases_replays(tmp_path: Path, way: str, compute: str, monkeypatch: Any) -> None:
    """bitsandbytes casts them to what it computes in."""
    if compute == "nf4 in bf16":
        plain = runs.quantization

        def in_bf16(kind: str) -> Any:
            config = plain(kind)
            config.bnb_4bit_compute_dtype = torch.bfloat16
            return config

        monkeypatch.setattr(runs, "quantization", in_bf16)
    kind = compute.split()[0]
    base = write_base(tmp_path / "base", tiny_opt, ffn_dim=128, word_embed_proj_dim=64)
    trainer = run(tmp_path / "run", way, base, kind, max_steps=4)
    assert_same_bits(held(replay(load(base, kind), tmp_path / "run")), held(trainer.model))
    trainer.save_model(str(tmp_path / "final"))
    assert loss_of(tmp_path, saved_model(tmp_path / "final", way, base, kind)) == trainer.evaluate()["eval_loss"]


def test_training_again_goes_on_from_what_was_learned(tmp_path: Path, base: Path) -> None:
    """Factors have become an adapter, which is then what trains."""
    trainer = run(tmp_path, "factors", base, "int8", max_steps=3, zo_subspace="auto")
    first = held(trainer.model)
    trainer.train()
    second = held(trainer.model)
    assert first.keys() == second.keys()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and all("lora_" in name for name in moved)


def test_weight_decay_shrinks_what_is_folded(tmp_path: Path, base: Path) -> None:
    """(1 - ηλ) a step, in expectation of the rounding, though each step is less than a code."""
    model = load(base, "int8")
    norm = sum(part.double().square().sum() for name, part in dequantized_parts(model).items())
    options = {"weight_decay": 1.0, "learning_rate": 1e-2, "max_steps": 6}
    trainer = trainer_for(tmp_path, "folds", base, "int8", zo_max_projected_grad=1e-6, **options)
    trainer.train()
    after = sum(part.double().square().sum() for name, part in dequantized_parts(trainer.model).items())
    assert (after / norm) ** 0.5 == pytest.approx(0.99**6, rel=2e-3)


def dequantized_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {str(index): decoded(layer) for index, layer in enumerate(quantized_layers(model).values())}


def test_a_saved_quantized_model_is_trained_on(tmp_path: Path, base: Path) -> None:
    """Loaded without a quantization_config, as it was saved."""
    run(tmp_path / "first", "folds", base, "int8", max_steps=3).save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    trainer = trained(tmp_path / "second", model, max_steps=3, learning_rate=1e-3, **SETUPS["folds"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert_same_bits(held(replay(again, tmp_path / "second")), held(trainer.model))
