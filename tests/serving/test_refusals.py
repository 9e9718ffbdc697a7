"""Models, losses and arguments that servers cannot evaluate: refused before training, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TinyTask, seeded, tiny_bert, tiny_mixtral
from tests.serving.runs import base, lora, make
from tests.serving.stand_in import serving
from tests.trainer.runs import config, with_lora
from zo_hf import ZOTrainer

URL = "http://127.0.0.1:1"


def with_own_adapter() -> nn.Module:
    from peft import LoraConfig

    model = base()
    model.add_adapter(LoraConfig(target_modules="all-linear"))
    return model


def with_ia3() -> nn.Module:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    return get_peft_model(base(), config)  # type: ignore[arg-type]


def with_a_norm() -> nn.Module:
    model = lora()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


MODELS: dict[str, tuple[Any, str]] = {
    "no adapter": (base, "LlamaForCausalLM is not a PEFT model; wrap the model by peft.get_peft_model"),
    "an adapter of transformers": (with_own_adapter, "LlamaForCausalLM is not a PEFT model"),
    "IA3": (with_ia3, "the model has an adapter of IA3Config"),
    "DoRA": (lambda: lora(use_dora=True), "use_dora of LoraConfig does not work with server_url=...; leave it out."),
    "ranks": (lambda: lora(rank_pattern={"q_proj": 2}), "rank_pattern of LoraConfig does not work"),
    "a head": (lambda: lora(modules_to_save=["lm_head"]), "modules_to_save of LoraConfig does not work"),
    "a bias": (lambda: lora(lora_bias=True), "lora_bias of LoraConfig does not work"),
    "a norm": (with_a_norm, "norm.weight is trainable, which no LoRA adapter of a server holds"),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name: str, tmp_path: Path) -> None:
    build, error = MODELS[name]
    with pytest.raises(ValueError) as refused:
        make(tmp_path, URL, build())
    assert error in str(refused.value) and str(refused.value).endswith(".")


class OwnLoss(ZOTrainer):
    """Has a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


def message(model: nn.Module, tmp_path: Path, kind: type[ZOTrainer] = ZOTrainer, **options: Any) -> str:
    args = config(tmp_path, server_url=URL, zo_fold_steps=None, **options)
    with pytest.raises(ValueError) as refused:
        kind(model, args, train_dataset=TinyTask()).train()
    return str(refused.value)


def test_other_losses(tmp_path: Path) -> None:
    own = "server_url=... takes the model's own loss, from probabilities of tokens"
    assert own in message(lora(), tmp_path, OwnLoss)
    assert own in message(lora(), tmp_path, label_smoothing_factor=0.1)
    classifier = with_lora(seeded(tiny_bert), target_modules=["query"])
    assert "BertForSequenceClassification has another" in message(classifier, tmp_path)
    router = seeded(tiny_mixtral, output_router_logits=True, router_aux_loss_coef=1.0)
    routed = with_lora(router, target_modules=["q_proj"])
    assert "the loss of MixtralForCausalLM has terms of its own" in message(routed, tmp_path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"server_url": ""}, "server_url='' names no server"),
        ({"server_url": "http://127.0.0.1:1, http://127.0.0.1:1/"}, "names a server twice; give each address once"),
        ({"server_url": 5}, "server_url=5 must be a string or a list of strings"),
        ({"server_url": [URL, "b"]}, "server_url='b' is not the address of a server"),
        ({"server_url": URL, "server_max_loras": 0}, "server_max_loras=0 must be a whole number of at least 1"),
        ({"server_url": URL, "server_timeout": 0}, "server_timeout=0 must be a finite number above 0"),
        ({"server_folder": "x"}, "server_folder='x' has no effect with server_url=None"),
        (
            {"server_url": URL, "zo_subspace": "low_rank"},
            "server_url=... does not combine with zo_subspace='low_rank'",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        config(tmp_path, **options)
    assert error in str(refused.value)


def test_addresses_may_be_a_list_or_have_commas(tmp_path: Path) -> None:
    from zo_hf.trainer.config import addresses

    assert addresses(f"{URL}, http://b/v1") == addresses([URL, "http://b/v1"]) == [URL, "http://b/v1"]


def test_the_comparison_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = lora()
    model.train()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    with serving(base) as stand_in:
        trainer = make(tmp_path, stand_in.url, model)
        trainer.create_optimizer()
        assert trainer.served.longest == 64 and model.training
        trainer._finish_zeroth_order()
    for name, parameter in model.named_parameters():
        value, flag = before[name]
        assert torch.equal(parameter, value) and parameter.requires_grad == flag, name
