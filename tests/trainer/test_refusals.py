"""What cannot work says so before training starts, in one sentence that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

from tests.conftest import TinyTask, seeded, tiny_opt
from tests.trainer.runs import config, make_trainer, with_lora
from zo_hf import ZOTrainer
from zo_hf.trainer.setup import check_processes


def one_sentence(message: str) -> bool:
    """Ends with its only full stop, on one line."""
    text = message.replace("...", "")
    return text.endswith(".") and ". " not in text and "\n" not in text


def refused(argument: str, attempt: Callable[[], Any]) -> str:
    """The message of the ValueError that `attempt` raises, having checked that it is a sentence about `argument`."""
    with pytest.raises(ValueError) as refusal:
        attempt()
    message = str(refusal.value)
    assert argument in message, message
    assert one_sentence(message), message
    return message


WRONG_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}),
    ("optim", {"optim": "lomo"}),
    ("optim", {"optim": "adalomo"}),
    ("optim", {"optim": "galore_adamw", "optim_target_modules": ["fc1"]}),
    ("optim", {"optim": "galore_adamw_layerwise", "optim_target_modules": ["fc1"]}),
    ("optim", {"optim": "galore_adafactor_layerwise", "optim_target_modules": ["fc1"]}),
    ("optim", {"optim": "apollo_adamw_layerwise", "optim_target_modules": ["fc1"]}),
    ("optim", {"optim": "schedule_free_sgd"}),
    ("optim", {"optim": "schedule_free_adamw"}),
    ("optim", {"optim": "schedule_free_radam"}),
    ("deepspeed", {"deepspeed": {"zero_optimization": {"stage": 2}}}),
    ("zo_subspace", {"zo_subspace": "lowrank"}),
    ("zo_estimator", {"zo_estimator": "three_point"}),
    ("zo_direction", {"zo_direction": "uniform"}),
    ("zo_rank", {"zo_rank": 0}),
    ("zo_fold_steps", {"zo_fold_steps": -1}),
    ("zo_eps", {"zo_eps": -1e-3}),
    ("zo_eps", {"zo_eps": 0}),
    ("zo_eps", {"zo_eps": "abc"}),
    ("zo_eps", {"zo_eps": float("nan")}),
    ("zo_eps", {"zo_eps": "inf"}),
    ("zo_num_directions", {"zo_num_directions": 0}),
    ("zo_batched_probes", {"zo_batched_probes": "maybe"}),
    ("zo_parallel", {"zo_parallel": "tensor"}),
    ("zo_check_steps", {"zo_check_steps": -1}),
    ("optim", {"zo_subspace": "full", "optim": "adamw_torch"}),
    ("optim", {"zo_subspace": "full", "optim": "adafactor"}),
    ("optim_args", {"zo_subspace": "full", "optim_args": "momentum=0.9"}),
]


@pytest.mark.parametrize(("argument", "options"), WRONG_OPTIONS, ids=[str(options) for _, options in WRONG_OPTIONS])
def test_a_wrong_option_is_refused_by_the_configuration(
    tmp_path: Path, argument: str, options: dict[str, Any]
) -> None:
    message = refused(argument, lambda: config(tmp_path, **options))
    value = options.get(argument)
    if isinstance(value, str) and argument.startswith(("zo_", "optim")):
        assert value in message


@pytest.mark.parametrize("options", [{"zo_target_modules": "lm"}, {"zo_exclude_modules": ".*"}], ids=str)
def test_a_pattern_that_leaves_nothing_is_refused_before_any_work(tmp_path: Path, options: dict[str, Any]) -> None:
    refused(next(iter(options)), lambda: make_trainer(tmp_path, **options))


def test_a_model_that_was_sharded_at_its_loading_is_refused(tmp_path: Path) -> None:
    model = seeded(tiny_opt)
    model.lm_head.weight.placements = ()  # what tells a DTensor
    refused("tp_plan", lambda: make_trainer(tmp_path, model))


def test_checkpointed_activations_are_refused_under_the_name_this_transformers_has(tmp_path: Path) -> None:
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    refused(name, lambda: config(tmp_path, **{name: True}))


@pytest.mark.parametrize("value", [None, "auto", 1e-3, "1e-3", 1])
def test_every_way_to_write_eps_is_taken(tmp_path: Path, value: Any) -> None:
    assert config(tmp_path, zo_eps=value).zo_eps in ("auto", 1e-3, 1)


def a_meta_model() -> nn.Module:
    with torch.device("meta"):
        return tiny_opt()


class Strided(PreTrainedModel):
    """Holds a weight whose memory is not contiguous, which cannot be written a slice at a time."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.embed = nn.Embedding(100, 16)
        self.mixer = nn.Linear(16, 16)
        self.mixer.weight = nn.Parameter(torch.randn(16, 16).t())
        self.head = nn.Linear(16, 100)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> dict:
        x = self.embed(input_ids)
        logits = self.head(self.mixer(x))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def with_scripted_head() -> nn.Module:
    model = seeded(tiny_opt)
    model.lm_head = torch.jit.script(nn.Linear(model.config.hidden_size, model.config.vocab_size))
    return model


def sgd_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def a_factory_of_optimizers() -> type:
    from transformers.trainer_optimizer import is_optimizer_factory

    class Factory:
        def __call__(self, model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
            return sgd_of(model)

    assert is_optimizer_factory(Factory)
    return Factory


def trains(trainer: ZOTrainer) -> None:
    trainer.train()


WRONG_RUNS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "full with optimizers=": (
        "optimizers",
        lambda folder: make_trainer(
            folder, model := seeded(tiny_opt), more={"optimizers": (sgd_of(model), None)}, zo_subspace="full"
        ),
    ),
    "full with optimizer_cls_and_kwargs=": (
        "optimizer_cls_and_kwargs",
        lambda folder: make_trainer(
            folder, more={"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})}, zo_subspace="full"
        ),
    ),
    "adapter without PEFT": ("zo_subspace", lambda folder: make_trainer(folder, zo_subspace="adapter")),
    "plain TrainingArguments": (
        "args",
        lambda folder: ZOTrainer(
            seeded(tiny_opt), TrainingArguments(str(folder), report_to=[], use_cpu=True), train_dataset=TinyTask()
        ),
    ),
    "weights on the meta device": ("device_map", lambda folder: make_trainer(folder, a_meta_model())),
    "scales of a model that has none": (
        "zo_subspace='scales'",
        lambda folder: make_trainer(folder, zo_subspace="scales"),
    ),
    "norms of a model that has none": (
        "zo_subspace='norms'",
        lambda folder: trains(make_trainer(folder, zo_subspace="norms", zo_exclude_modules=r".*bias|.*norm.*")),
    ),
    "an adapter that only evaluates": (
        "is_trainable=True",
        lambda folder: trains(make_trainer(folder, with_lora(seeded(tiny_opt), inference_mode=True))),
    ),
    "no target": (
        "zo_target_modules",
        lambda folder: trains(make_trainer(folder, zo_target_modules=["no_such_module"])),
    ),
    "no target by expression": (
        "zo_target_modules",
        lambda folder: trains(make_trainer(folder, zo_target_modules="fc")),
    ),
    "everything excluded": (
        "zo_exclude_modules",
        lambda folder: trains(make_trainer(folder, zo_exclude_modules=".*")),
    ),
    "nothing trainable": (
        "requires_grad",
        lambda folder: trains(make_trainer(folder, seeded(tiny_opt).requires_grad_(False))),
    ),
    "a scripted module": ("TorchScript", lambda folder: make_trainer(folder, with_scripted_head())),
    "weights in another order": ("zo_exclude_modules", lambda folder: trains(make_trainer(folder, Strided()))),
    "an optimizer factory": (
        "optimizer_cls_and_kwargs",
        lambda folder: trains(
            make_trainer(folder, more={"optimizer_cls_and_kwargs": (a_factory_of_optimizers(), {})})
        ),
    ),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_a_wrong_run_is_refused_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def no_step(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr(ZOTrainer, "training_step", no_step)
    argument, attempt = WRONG_RUNS[name]
    refused(argument, lambda: attempt(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_hook_on_a_gradient_is_refused(tmp_path: Path) -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        trainer = make_trainer(tmp_path)
        handle = getattr(trainer.model.lm_head.weight, register)(lambda gradient: gradient)
        assert "remove the hook" in refused("embed_tokens.weight", trainer.train)
        handle.remove()


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_callback_that_freezes_is_refused(tmp_path: Path, subspace: str) -> None:
    """Trainer would leave such a parameter alone, because it gets no gradient."""

    class Freezes(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.model.decoder.layers[0].fc1.weight.requires_grad_(False)

    trainer = make_trainer(tmp_path, zo_subspace=subspace, more={"callbacks": [Freezes()]})
    before = trainer.model.model.decoder.layers[0].fc1.weight.detach().clone()
    assert "before train()" in refused("fc1.weight", trainer.train)
    assert torch.equal(trainer.model.model.decoder.layers[0].fc1.weight, before)
    make_trainer(tmp_path, zo_subspace=subspace, zo_exclude_modules=["fc1"], more={"callbacks": [Freezes()]}).train()


def test_a_refused_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Strided()
    with pytest.raises(ValueError):
        make_trainer(tmp_path, model).train()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_was_refused_trains_once_it_is_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Strided(), max_steps=1, zo_exclude_modules="mixer")
    before = trainer.model.head.weight.clone(), trainer.model.mixer.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.head.weight, before[0])
    assert torch.equal(trainer.model.mixer.weight, before[1])


def test_a_peft_model_is_taken_as_an_adapter_unless_told_otherwise(tmp_path: Path) -> None:
    model = with_lora(seeded(tiny_opt))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    assert frozen and all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())


def test_a_search_for_the_batch_size_by_several_processes_is_refused() -> None:
    args = SimpleNamespace(n_gpu=0, world_size=2, auto_find_batch_size=True)
    message = refused("auto_find_batch_size", lambda: check_processes(args))
    assert "per_device_train_batch_size" in message
    args.auto_find_batch_size = False
    check_processes(args)


def test_several_processes_that_would_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `accelerate launch --cpu --num_processes 2`, which sets the number and starts no process group."""
    args = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("use_cpu", lambda: ZOTrainer(seeded(tiny_opt), args, train_dataset=TinyTask()))
