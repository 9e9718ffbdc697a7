"""Several adapters, what is refused, the scale of each family, and layers that other subspaces move."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import HfArgumentParser

from tests.conftest import causal_batch, seeded, tiny_llama, weights_of
from tests.subspaces.helpers import direction, sgd
from tests.subspaces.peft.methods import METHODS
from tests.subspaces.peft.test_methods import own_loss
from tests.trainer.runs import config, make_trainer, trained, with_lora
from zo_hf import ZOConfig
from zo_hf.engine import ZerothOrder
from zo_hf.subspaces import SUBSPACES, Adapter


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera", "prompt tuning", "prefix tuning"])
def test_only_the_active_adapter_moves(name: str) -> None:
    """Whichever it is when training begins."""
    method = METHODS[name]
    model, batch = method.model(moved=0.1), method.batch()
    kind, options = method.config
    model.add_adapter("second", getattr(peft, kind)(**options))
    for active, idle in (("second", "default"), ("default", "second")):
        model.set_adapter(active)
        before = weights_of(model)
        zo = ZerothOrder(model, "adapter")
        optimizer = sgd(zo, lr=1.0)
        zo.estimate(lambda: method.exact_loss(model, batch))
        optimizer.step()
        zo.finish()
        moved = {key for key, tensor in weights_of(model).items() if not torch.equal(tensor, before[key])}
        assert moved
        assert all(active in key.split(".") and idle not in key.split(".") for key in moved)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "AdaLoraConfig",
            {"target_modules": ["q_proj"], "total_step": 9},
            "AdaLoRA chooses its ranks by the gradients",
        ),
        ("OSFConfig", {"target_modules": ["q_proj"], "effective_rank": 4}, "orthogonal subspace fine-tuning projects"),
        (
            "CPTConfig",
            {"cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1], "task_type": "CAUSAL_LM"},
            "context-aware prompt tuning scales and bounds gradients",
        ),
    ],
)
def test_a_method_that_needs_gradients_is_refused_by_name(
    kind: str, options: dict, message: str, tmp_path: Path
) -> None:
    model = peft.get_peft_model(seeded(tiny_llama), getattr(peft, kind)(**options))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match="use another method of PEFT, such as LoRA"):
        ZerothOrder(model, "adapter")


def test_a_recurrent_prompt_encoder_moves() -> None:
    """torch's recurrent layers read their weights from a list."""
    options = {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "task_type": "CAUSAL_LM"}
    encoder = peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM", **options)
    model, batch = peft.get_peft_model(seeded(tiny_llama), encoder), causal_batch()
    zo = ZerothOrder(model, "adapter", batched_probes=False)
    lstm = [name for name in zo.subspace.coordinates if "lstm" in name]
    assert zo.estimate(lambda: model(**batch).loss).projected_gradients[0] != 0.0
    assert lstm and all(zo.subspace.coordinates[name].grad is not None for name in lstm)


def test_lora_on_multihead_attention_is_refused() -> None:
    """PEFT writes the base weight in that layer's forward."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ValueError, match="PEFT writes it into the attention's weights; leave it out"):
        ZerothOrder(model, "adapter")


# Each family's scale.

SCALES = {"lora": (1e-2, 3e-4), "ia3": (1e-2, 1e-4), "vera": (1e-2, 1e-4), "dora": (1e-2, 3e-4)}
SCALES |= {"ln tuning": (1e-3, 1e-3), "prefix tuning": (1e-1, 1e-2), "prompt tuning": (1e-1, 1e-2)}


@pytest.mark.parametrize("name", SCALES)
def test_defaults_are_the_familys(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a training; the same arguments then serve a model of another kind."""
    eps, rate = SCALES[name]
    args = config(tmp_path, learning_rate=None, max_steps=1)
    assert args.learning_rate is None
    with caplog.at_level(logging.INFO, logger="zo_hf.trainer.trainer"):
        trainer = trained(tmp_path, METHODS[name].model(), learning_rate=None, max_steps=1)
    assert f"zo_eps={eps:g}, learning_rate={rate:g}" in caplog.text
    assert trainer.state.log_history[0]["learning_rate"] == rate
    assert trainer.args.learning_rate is None


@pytest.mark.parametrize(
    ("patterns", "rate"),
    [
        ({"zo_target_modules": ".*lora_.*"}, 1e-4),
        ({"zo_exclude_modules": r".*layers[.]0[.].*"}, 1e-4),
        ({"zo_exclude_modules": r".*(lora_A|layers[.]0[.]).*"}, 3e-4),
        ({"zo_target_modules": ".*lora_A.*"}, 1e-4),
    ],
)
def test_the_default_of_b_alone_is_for_b_alone(patterns: dict[str, str], rate: float, tmp_path: Path) -> None:
    """A pattern moves both factors that it leaves in, also where it leaves some A out."""
    trainer = trained(tmp_path, METHODS["lora"].model(), learning_rate=None, max_steps=1, **patterns)
    assert trainer.state.log_history[0]["learning_rate"] == rate


def test_an_explicit_number_wins(tmp_path: Path) -> None:
    trainer = trained(tmp_path, METHODS["prompt tuning"].model(), learning_rate=1e-5, max_steps=1)
    assert trainer.state.log_history[0]["learning_rate"] == trainer.args.learning_rate == 1e-5


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_weights_have_the_learning_rate_of_weights(subspace: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, zo_subspace=subspace, learning_rate=None, max_steps=1)
    assert trainer.state.log_history[0]["learning_rate"] == 1e-5


def test_the_command_line_reads_a_learning_rate(tmp_path: Path) -> None:
    parser = HfArgumentParser(ZOConfig)
    folder = ["--output_dir", str(tmp_path)]
    assert parser.parse_args_into_dataclasses([*folder, "--learning_rate", "3e-4"])[0].learning_rate == 3e-4
    assert parser.parse_args_into_dataclasses(folder)[0].learning_rate is None


# Layers that read inside.


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ("dora", "ia3", "vera")), ("dora", torch.bfloat16), ("ia3", torch.bfloat16)],
)
def test_other_subspaces_enter_the_same_layers(subspace: str, name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]
    model, batch = method.model(dtype, moved=0.1), method.batch()
    zo = ZerothOrder(model, SUBSPACES[subspace](model), eps=1e-2, num_directions=2, batched_probes=False)
    losses = zo.probe(lambda: method.exact_loss(model, batch).float())
    assert not zo.subspace.reads.unread()
    assert (losses[::2] - losses[1::2]).abs().max() > 1e-5


def test_a_hook_of_accelerate_on_a_child_is_kept() -> None:
    """Such as dispatching places on every module: what stands in for the child has it too, and its own weights."""
    method = METHODS["dora"]
    plain, hooked = method.model(moved=0.1), method.model(moved=0.1)
    calls = []

    class Counts(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return super().pre_forward(module, *args, **kwargs)

    for module in list(hooked.modules()):
        if isinstance(module, torch.nn.Linear):
            add_hook_to_module(module, Counts(execution_device="cpu"))
    losses = []
    for model in (plain, hooked):
        zo = ZerothOrder(model, "adapter", eps=1e-2, batched_probes=False)
        losses.append(zo.probe(lambda model=model: method.exact_loss(model, method.batch())))
        zo.subspace.detach()
    assert torch.equal(losses[0], losses[1])
    assert calls


def test_half_precision_adapters_become_float32() -> None:
    """So that small updates survive, in layers that read their children's weights too."""
    model = with_lora(seeded(tiny_llama, torch.bfloat16), use_dora=True, target_modules=["q_proj"])
    space = Adapter(model)
    assert {c.dtype for c in space.coordinates.values()} == {torch.float32}
    assert direction(space).keys() == space.coordinates.keys()


@pytest.mark.parametrize("name", ["lora with modules to save", "ln tuning"])
def test_layers_of_a_half_precision_model_move_in_float32(name: str) -> None:
    """A head or a norm takes what the layer before it gives, in training and after."""
    kind, options = METHODS[name].config
    model = peft.get_peft_model(seeded(tiny_llama, torch.bfloat16), getattr(peft, kind)(**options)).eval()
    dtypes = {key: p.dtype for key, p in model.named_parameters()}
    batch = METHODS[name].batch()
    zo = ZerothOrder(model, "adapter")
    optimizer = sgd(zo, lr=1e-3)
    assert {c.dtype for c in zo.subspace.coordinates.values()} == {torch.float32}
    for _ in range(2):
        assert zo.estimate(own_loss(model, batch)).is_finite
        optimizer.step()
        assert model(**batch).loss.isfinite()
    zo.finish()
    assert {key: p.dtype for key, p in model.named_parameters()} == dtypes
    assert model(**batch).loss.isfinite()


def test_an_adaption_prompt_in_half_precision_is_refused() -> None:
    kind, options = METHODS["adaption prompt"].config
    model = peft.get_peft_model(seeded(tiny_llama, torch.bfloat16), getattr(peft, kind)(**options))
    with pytest.raises(ValueError, match="load the model in float32"):
        ZerothOrder(model, "adapter")


def test_what_norms_have_learned_in_bfloat16_outlasts_training() -> None:
    """Each moved by a hundredth of a place; rounded to the nearest, all of it would be lost at the end."""
    torch.manual_seed(0)
    base = seeded(tiny_llama, torch.bfloat16, hidden_size=512, num_attention_heads=4)
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"])
    model = peft.get_peft_model(base, config).eval()
    zo = ZerothOrder(model, "adapter")
    before = {name: p.detach().clone() for name, p in zo.subspace.coordinates.items()}
    place = 2.0**-7  # above 1
    for coordinate in zo.subspace.coordinates.values():
        coordinate.data.add_(0.1 * place)
    zo.finish()
    parameters = dict(model.named_parameters())
    moved = torch.cat([(parameters[name].float() - before[name]).flatten() for name in before])
    assert parameters[next(iter(before))].dtype == torch.bfloat16
    assert moved.mean().item() == pytest.approx(0.1 * place, rel=0.2)


@pytest.mark.parametrize("name", ["lora", "lora on embeddings", "dora"])
def test_of_a_lora_that_begins_at_zero_only_that_factor_moves(name: str) -> None:
    """The loss does not depend on the other one at first; a pattern has both move."""
    model = METHODS[name].model()
    names = set(Adapter(model).coordinates)
    stays = [n for n in Adapter(model).start if n not in names]
    assert stays and all("lora_A" in n or "lora_embedding_B" in n for n in stays)
    assert not any("lora_A" in n or "lora_embedding_B" in n for n in names)
    assert set(Adapter(model, target_modules=r".*lora_.*").coordinates) > set(stays)
