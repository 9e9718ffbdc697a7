"""Logits in chunks give the loss of logits as a whole, at probes as well, and never exist as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.conftest import (
    CAUSAL_MODELS,
    LENGTH,
    VOCABULARY,
    TinyTask,
    causal_batch,
    seeded,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
)
from tests.evaluation.test_model_loss import PenalizedForCausalLM
from tests.trainer.runs import logged, trained
from zo_hf import ZerothOrder
from zo_hf.directions import GAUSSIAN
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation import chunked_head
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}

MODELS = {
    **CAUSAL_MODELS,
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "a cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZE, head_dim=16, final_logit_softcapping=1.0)),
    "a scale": lambda: CohereForCausalLM(CohereConfig(**SIZE, logit_scale=0.25, eos_token_id=1)),
    "a divisor": lambda: GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=3.0)),
}
ROWS = 4


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "TOKENS", 16)


def batch_of(labels: str = "everywhere") -> dict[str, Tensor]:
    batch = causal_batch(ROWS)
    batch["labels"] = batch["input_ids"].clone()
    batch["attention_mask"][0, -3:] = 0
    batch["labels"][batch["attention_mask"] == 0] = -100
    if labels == "at the end":
        batch["labels"][:, : -LENGTH // 2 + 1] = -100
    return batch


def loss_of(model: Any, batch: dict[str, Tensor], inner: Any = None, **options: Any) -> ModelLoss:
    return ModelLoss(model, inner or model, batch, lambda inputs: model(**inputs).loss, **options)


def moved(model: nn.Module, subspace: str = "low_rank", **options: Any) -> ZerothOrder:
    """An engine away from the origin, where every factor counts."""
    zo = ZerothOrder(model, subspace, rows_per_direction=0, **options)
    generator = torch.Generator().manual_seed(1)
    for coordinate in zo.subspace.coordinates.values():
        coordinate.data += 0.1 * torch.randn(coordinate.shape, generator=generator)
    zo.subspace.coordinates_changed()
    return zo


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """Note for how many tokens an operation returns logits at most."""
    largest = [0]
    transposed_weight = (32, VOCABULARY)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            is_logits = isinstance(output, Tensor) and output.shape[-1:] == (VOCABULARY,)
            if is_logits and tuple(output.shape) != transposed_weight:
                largest[0] = max(largest[0], output.numel() // VOCABULARY)
            return output

    with Watch():
        yield largest


@pytest.mark.parametrize("labels", ["everywhere", "at the end"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_model(name: str, labels: str) -> None:
    model, batch, checks = seeded(MODELS[name]), batch_of(labels), LossChecks()
    zo = moved(model)
    with torch.no_grad():
        expected = model(**batch).loss
        assert loss_of(model, batch, checks=checks)().item() == pytest.approx(expected.item(), rel=1e-6)
        assert checks.in_chunks is True
        points = [Probe(index, 0.1) for index in range(ROWS)]
        with zo.subspace.at(points, zo._stream, GAUSSIAN, rows=1):
            shares = loss_of(model, batch, checks=checks).by_groups(ROWS)
            torch.testing.assert_close(shares, loss_of(model, batch, divides=False).by_groups(ROWS))
        with zo.subspace.at(points[:2], zo._stream, GAUSSIAN, rows=ROWS):
            together = loss_of(model, batch, checks=checks).batched(2)
        for point, loss in zip(points, together, strict=False):
            with zo.subspace.at((point,), zo._stream, GAUSSIAN):
                assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
                assert loss.item() != pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("way", ["one by one", "in one batch", "by rows"])
def test_logits_never_exist_as_a_whole(way: str) -> None:
    model = seeded(tiny_llama)
    zo = ZerothOrder(model, rows_per_direction=int(way == "by rows"), batched_probes=way == "in one batch")
    checks = LossChecks()
    for _ in range(2):
        with largest_tensor() as largest:
            zo.estimate(loss_of(model, batch_of(), checks=checks))
        assert 0 < largest[0] <= chunked_head.TOKENS
        zo.discard()
    assert checks.in_chunks is True and checks.is_known is None


@pytest.mark.parametrize("where", ["low_rank on the head alone", "LoRA on the head alone", "a tied head"])
def test_every_chunk_sees_the_perturbation_of_the_head(where: str) -> None:
    model: Any = seeded(tiny_llama, tie_word_embeddings=where == "a tied head")
    inner, subspace, options = model, "low_rank", {"target_modules": "lm_head.weight"}
    if where.startswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        model, subspace, options = get_peft_model(inner, LoraConfig(r=2, target_modules=["lm_head"])), "adapter", {}
    elif where == "a tied head":
        options = {"target_modules": "model.embed_tokens.weight"}
    zo = moved(model, subspace, **options)
    for scale in (0.1, -0.1):
        with torch.no_grad(), zo.subspace.at((Probe(0, scale),), zo._stream, GAUSSIAN):
            whole = model(**batch_of()).loss.item()
            assert loss_of(model, batch_of(), inner)().item() == pytest.approx(whole, rel=1e-6)
    with torch.no_grad():
        assert model(**batch_of()).loss.item() != pytest.approx(whole, rel=1e-4)


def test_the_estimate_of_a_step_is_the_same() -> None:
    found = []
    for divides in (True, False):
        zo = ZerothOrder(seeded(tiny_opt), rows_per_direction=1, eps=1e-2)
        estimate = zo.estimate(loss_of(zo.model, batch_of(), divides=divides))
        found.append(torch.tensor([*estimate.projected_gradients, estimate.loss]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_tangents_pass_through_the_chunks() -> None:
    found = []
    for divides in (True, False):
        model = seeded(tiny_opt, attn_implementation="eager")
        zo = ZerothOrder(model, rows_per_direction=1, estimator="forward_gradient")
        estimate = zo.estimate(loss_of(zo.model, batch_of(), divides=divides))
        found.append(torch.tensor(estimate.projected_gradients))
    torch.testing.assert_close(*found)


def test_a_divisor_of_all_processes_is_kept() -> None:
    model, batch = seeded(tiny_llama), batch_of()
    with torch.no_grad():
        whole = model(**batch, num_items_in_batch=torch.tensor(100)).loss.item()
        loss = loss_of(model, batch, num_items_in_batch=torch.tensor(100), factor=2.0)
        assert loss().item() == pytest.approx(2 * whole, rel=1e-6)


def with_router() -> nn.Module:
    return tiny_mixtral(output_router_logits=True, router_aux_loss_coef=0.1)


@pytest.mark.parametrize("build", [with_router, lambda: PenalizedForCausalLM(tiny_llama().config)])
def test_a_loss_with_terms_of_its_own_keeps_all_logits(build: Any) -> None:
    model, checks = seeded(build), LossChecks()
    with torch.no_grad():
        whole = model(**batch_of()).loss.item()
        assert loss_of(model, batch_of(), checks=checks)().item() == pytest.approx(whole, rel=1e-6)
    assert not checks.in_chunks


def test_a_head_that_mixes_positions_keeps_all_logits() -> None:
    model, checks = seeded(tiny_llama), LossChecks()
    head = model.lm_head

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return head(x + x.mean(1, keepdim=True))

    model.lm_head = Mixing()
    with torch.no_grad():
        whole = model(**batch_of()).loss.item()
        assert loss_of(model, batch_of(), checks=checks)().item() == pytest.approx(whole, rel=1e-6)
    assert checks.in_chunks is False


@pytest.mark.parametrize(
    ("more", "why"),
    [({"inputs_embeds": torch.zeros(ROWS, LENGTH, 32)}, "embeddings"), ({"logits_to_keep": LENGTH}, "a number")],
)
def test_a_batch_with_other_inputs_keeps_all_logits(more: dict[str, Any], why: str) -> None:
    batch = batch_of() | more
    if why == "embeddings":
        del batch["input_ids"]
    model, checks = seeded(tiny_llama), LossChecks()
    with torch.no_grad():
        whole = model(**batch).loss.item()
        assert loss_of(model, batch, checks=checks)().item() == pytest.approx(whole, rel=1e-6)
    assert checks.in_chunks is None


def test_nothing_is_left_on_the_model() -> None:
    model = seeded(tiny_llama)

    def fails(*_: Any) -> None:
        raise RuntimeError("in the head")

    handle = model.lm_head.register_forward_pre_hook(fails)
    loss = loss_of(model, batch_of(), checks=LossChecks(in_chunks=True))
    with torch.no_grad(), pytest.raises(RuntimeError, match="in the head"):
        loss()
    handle.remove()
    assert not model.model._forward_hooks and "forward" not in model.model.__dict__
    with torch.no_grad():
        assert loss().item() == pytest.approx(model(**batch_of()).loss.item(), rel=1e-6)


class AllLabeled(TinyTask):
    """Rows padded on the left, with a label for every other token."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: value.clone() for name, value in super().__getitem__(index).items()}
        row["attention_mask"][: index % 3] = 0
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        return row


@pytest.mark.parametrize("rows", [0, 1])
def test_a_trainer_computes_chunks(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks that Trainer's own classes put on the model do not stand in the way."""
    chunks, losses = [], chunked_head.ChunkedHead.losses
    monkeypatch.setattr(chunked_head.ChunkedHead, "losses", lambda *args: chunks.append(tokens) or losses(*args))
    found = {}
    for tokens in (16, 1 << 30):
        monkeypatch.setattr(chunked_head, "TOKENS", tokens)
        options = {"zo_rows_per_direction": rows, "max_steps": 2, "gradient_accumulation_steps": 2}
        trainer = trained(tmp_path, seeded(tiny_llama), more={"train_dataset": AllLabeled()}, **options)
        found[tokens] = logged(trainer, "loss") + logged(trainer, "zo/projected_grad")
    assert set(chunks) == {16}
    assert found[16] == pytest.approx(found[1 << 30], rel=1e-3)


def test_a_hook_on_the_model_keeps_all_logits() -> None:
    model, checks = seeded(tiny_llama), LossChecks()
    model.register_forward_hook(lambda _, args, output: None)
    with torch.no_grad():
        loss_of(model, batch_of(), checks=checks)()
    assert checks.in_chunks is None
