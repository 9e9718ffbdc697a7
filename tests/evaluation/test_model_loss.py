"""Models whose loss is more than the known function of their logits: no term is lost, in one batch or with few logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
)

from tests.conftest import VOCABULARY, causal_batch, seeded, tiny_llama, tiny_mixtral, tiny_opt
from tests.subspaces.helpers import loss_of
from tests.trainer.runs import Recorder, logged, trained
from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.model_loss import LossChecks


def with_router() -> nn.Module:
    return seeded(tiny_mixtral, output_router_logits=True, router_aux_loss_coef=0.1)


def with_z_loss() -> nn.Module:
    """A hybrid that adds to its loss a term of the logits at all positions."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
    config = BambaConfig(vocab_size=VOCABULARY, pad_token_id=0, attn_layer_indices=[0], z_loss_coefficient=0.1, **size)
    return seeded(lambda: BambaForCausalLM(config))


def compares_all_positions() -> nn.Module:
    """A decoder that accepts logits_to_keep, and computes a cross entropy of its own over all positions."""
    size = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    config = BartConfig(vocab_size=VOCABULARY, is_decoder=True, is_encoder_decoder=False, init_std=0.1, **size)
    return seeded(lambda: BartForCausalLM(config))


class PenalizedForCausalLM(LlamaForCausalLM):
    """Adds a penalty on all logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.square().mean()
        return outputs


class DistanceForCausalLM(OPTForCausalLM):
    """Adds 1000 times the squared distance of its final norm from where it began, which is 0 in the first batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        distance = (self.model.decoder.final_layer_norm.bias - 0.0).square().sum()
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 1000 * distance
        return outputs


def penalized() -> nn.Module:
    return seeded(lambda: PenalizedForCausalLM(tiny_llama().config))


MODELS = {
    "router": with_router,
    "z-loss": with_z_loss,
    "all positions": compares_all_positions,
    "a term in forward": penalized,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_term_of_the_models_loss_is_there(tmp_path: Path, build: Any, dtype: torch.dtype) -> None:
    batches = Recorder()
    options = {
        "max_steps": 1,
        "zo_eps": 1e-4,
        "zo_rank": 1,
        "remove_unused_columns": False,
        "zo_direction": "gaussian",
    }
    trainer = trained(tmp_path, build().to(dtype), more={"data_collator": batches}, **options)
    with torch.no_grad():
        expected = build().to(dtype)(**batches.batches[0]).loss.item()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-2)
    alone = trained(tmp_path, build().to(dtype), zo_batched_probes=False, **options)
    assert logged(trainer, "zo/projected_grad") == logged(alone, "zo/projected_grad")
    try:
        insists = trained(tmp_path, build().to(dtype), zo_batched_probes=True, **options)
    except NotBatchable as error:
        assert re.search(r"zo_batched_probes=True .* terms of its own; use zo_batched_probes='auto'", str(error))
    else:  # its forward for all probes fails, so that this batch is evaluated one probe at a time
        assert logged(insists, "zo/projected_grad") == logged(alone, "zo/projected_grad")


def test_a_term_that_is_0_at_first_is_noticed_when_it_comes() -> None:
    model = seeded(lambda: DistanceForCausalLM(tiny_opt().config))
    checks = LossChecks()
    losses = loss_of(model, causal_batch(), checks=checks)
    with torch.no_grad():
        assert losses.batched(2)[0].item() == pytest.approx(losses().item(), rel=1e-5)
        model.model.decoder.final_layer_norm.bias += 0.1
        with pytest.raises(NotBatchable, match="terms of its own"):
            losses.batched(2)
        assert losses().item() == pytest.approx(model(**causal_batch()).loss.item(), rel=1e-6)


class WarmsUpForCausalLM(OPTForCausalLM):
    """Adds a term to its loss function after the first evaluations."""

    strength = 0.0

    @property
    def loss_function(self) -> Any:
        return lambda logits, *args, **kwargs: (
            super(WarmsUpForCausalLM, self).loss_function(logits, *args, **kwargs)
            + self.strength * logits.square().mean()
        )


def assigned() -> nn.Module:
    """The same function on an instance of a class of transformers."""
    model: Any = seeded(tiny_opt)
    plain, model.strength = model.loss_function, 0.0
    model.loss_function = lambda logits, *args, **kwargs: (
        plain(logits, *args, **kwargs) + model.strength * logits.square().mean()
    )
    return model


@pytest.mark.parametrize("build", [lambda: seeded(lambda: WarmsUpForCausalLM(tiny_opt().config)), assigned])
def test_a_loss_function_of_ones_own_is_compared_in_every_batch(build: Any) -> None:
    model = build()
    losses = loss_of(model, causal_batch(), checks=LossChecks())
    with torch.no_grad():
        assert losses.batched(2)[0].item() == pytest.approx(losses().item(), rel=1e-5)
        model.strength = 1.0
        with pytest.raises(NotBatchable, match="terms of its own"):
            losses.batched(2)
        assert losses().item() == pytest.approx(model(**causal_batch()).loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "max_length_q", "seq_idx"])
def test_a_batch_that_is_free_of_padding_is_not_repeated(name: str) -> None:
    model = seeded(tiny_llama)
    batch = causal_batch(1) | {"position_ids": torch.arange(6).repeat(2)[None], name: torch.tensor([0, 6, 12])}
    del batch["attention_mask"]
    with pytest.raises(NotBatchable, match=f"{name} describes"):
        loss_of(model, batch).batched(2)


def test_a_later_batch_with_other_inputs_is_evaluated_one_probe_at_a_time() -> None:
    model, checks = seeded(tiny_llama), LossChecks()
    loss_of(model, causal_batch(3), checks=checks).batched(2)
    loss_of(model, causal_batch(5), checks=checks).batched(2)
    more = causal_batch(3) | {"position_ids": torch.arange(12)[None].expand(3, -1)}
    with pytest.raises(NotBatchable, match="other inputs"):
        loss_of(model, more, checks=checks).batched(2)


def test_a_known_loss_stays_with_few_logits_and_one_forward_pass() -> None:
    model, checks = seeded(tiny_opt), LossChecks()
    seen: list[tuple[int, bool]] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((output.logits.shape[1], "labels" in kwargs))

    with torch.no_grad():
        for _ in range(2):
            losses = loss_of(model, causal_batch(), checks=checks)
            # Hooks of the user's own make the comparison permanent, so look from inside.
            handle = model.register_forward_hook(look, with_kwargs=True)
            losses()
            handle.remove()
            losses.batched(2)
    assert seen == [(1, True), (1, True)]
    assert checks.is_known is True
