"""Heads of many kinds of classifiers, fitted to features that the test gets by a hook of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tests.conftest import assert_same_bits, seeded, tiny_bert, weights_of
from tests.parallel.launch import run
from zo_hf import fit_head
from zo_hf.heads.discriminant import fit_discriminant

VOCAB = 97
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLASSES = 3


def bert(**options: Any) -> nn.Module:
    return tiny_bert(num_labels=CLASSES, **options)


def tokens() -> nn.Module:
    return BertForTokenClassification(BertConfig(**SIZE, vocab_size=VOCAB, num_labels=CLASSES))


def roberta() -> nn.Module:
    config = RobertaConfig(**SIZE, vocab_size=VOCAB, num_labels=CLASSES, pad_token_id=0, max_position_embeddings=40)
    return RobertaForSequenceClassification(config)


def llama() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SIZE, vocab_size=VOCAB, num_labels=CLASSES, pad_token_id=0))


def images() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=CLASSES))


def lora() -> nn.Module:
    return peft.get_peft_model(llama(), peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, target_modules=["q_proj"]))


#: A classifier, and the name of its head.
KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (bert, "classifier"),
    "roberta": (roberta, "classifier.out_proj"),
    "llama": (llama, "score"),
    "tokens": (tokens, "classifier"),
    "images": (images, "classifier"),
    "lora": (lora, "base_model.model.score.modules_to_save.default"),
}


def batches_of(kind: str, count: int = 8, rows: int = 6) -> list[dict[str, Tensor]]:
    """Batches whose labels follow from their rows: the first token, or the brightness of an image."""
    found = []
    for seed in range(count):
        labels = torch.arange(rows) % CLASSES
        if kind == "images":
            noise = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            found.append({"pixel_values": noise + labels[:, None, None, None], "labels": labels})
            continue
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, 16, (rows, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        wanted = (ids % CLASSES).masked_fill(mask == 0, -100)
        if kind != "tokens":
            ids[:, :4] = ids[:, -1:] = 1 + labels[:, None]
            wanted = labels
        ids[1, 4:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": wanted})
    return found


def features_by_hook(model: nn.Module, name: str, kind: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """The inputs of the head at the positions that count, (rows, features)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    found = []
    with torch.no_grad():
        for batch in batches:
            seen.clear()
            model(**{key: value for key, value in batch.items() if key != "labels"})
            inputs = seen[0]
            if kind in ("llama", "lora"):
                inputs = inputs[torch.arange(len(inputs)), batch["attention_mask"].sum(1) - 1]
            elif kind == "tokens":
                inputs = inputs[batch["labels"] != -100]
            found.append(inputs)
    handle.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_the_discriminant_of_its_inputs(kind: str) -> None:
    build, name = KINDS[kind]
    model = seeded(build).train()
    batches = batches_of(kind)
    before = weights_of(model)
    found = fit_head(model, batches)
    labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    assert (found.name, found.rows, found.forward_passes) == (name, len(labels), len(batches) + 2)
    assert model.training, "its mode is what it was"

    model.eval()
    head = model.get_submodule(name)
    features = features_by_hook(model, name, kind, batches)
    expected, scores = fit_discriminant(features, labels, CLASSES, head.bias is not None)
    torch.testing.assert_close(head.weight.double(), expected.weight, rtol=1e-4, atol=1e-4)
    if head.bias is not None:
        torch.testing.assert_close(head.bias.double(), expected.bias, rtol=1e-4, atol=1e-4)
    assert found.accuracy == (scores.argmax(1) == labels).double().mean().item() > 0.6
    assert_same_bits(
        {key: value for key, value in weights_of(model).items() if not key.startswith(name)},
        {key: value for key, value in before.items() if not key.startswith(name)},
    )


def test_a_model_in_bfloat16_and_a_head_of_zeros_are_fitted_alike() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = seeded(llama).to(dtype)
        nn.init.zeros_(model.score.weight)
        found.append(fit_head(model, batches_of("llama")))
    assert found[0].accuracy == pytest.approx(found[1].accuracy, abs=0.1)
    assert found[0].accuracy > 0.6


def test_no_more_batches_are_read_than_needed() -> None:
    read = []

    def batches() -> Any:
        for batch in batches_of("bert"):
            read.append(len(batch["labels"]))
            yield batch

    assert fit_head(seeded(bert), batches(), max_rows=13).rows == sum(read) == 18


class Scaled(nn.Module):
    """A classifier whose logits are not the outputs of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x).tanh()}


class MeanOfLogits(nn.Module):
    """A classifier whose logits are means of a layer's outputs: of 7 outputs, the mean number is that of the middle one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(input_ids)).mean(1)}


def with_adapter(targets: list[str], **options: Any) -> nn.Module:
    return peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=targets, **options))


def with_labels(labels: Tensor) -> list[dict[str, Tensor]]:
    return [batch | {"labels": labels} for batch in batches_of("bert", 1)]


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (bert, [], "got no batch"),
        (bert, with_labels(torch.zeros(6)), "class numbers as a tensor of integers"),
        (bert, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}], "class numbers as a tensor of integers"),
        (bert, with_labels(torch.tensor([0, 1, 2, 3, 0, 1])), "classes 0 to 2; load the model with the right num_labels"),
        (bert, with_labels(torch.tensor([0, 1, 0, 1, 0, 2])), "two rows or more of every class, and there are fewer of class 2"),
        (bert, with_labels(torch.zeros(6, 2, dtype=torch.long)), r"the shape \(6, 2\), and the logits have \(6,\)"),
        (lambda: tiny_bert(num_labels=1), with_labels(torch.zeros(6, dtype=torch.long)), "two classes or more"),
        (Scaled, [{"x": torch.ones(2, 4), "labels": torch.tensor([0, 1])}], "no linear layer of Scaled has the logits"),
        (MeanOfLogits, batches_of("bert"), "no linear layer of MeanOfLogits has the logits"),
        (bert, [{"input_ids": torch.ones(2, 3, dtype=torch.long), "label": torch.tensor([0, 1])}], "has `label`; rename it"),
        (lambda: tiny_bert(num_labels=CLASSES, problem_type="multi_label_classification"), batches_of("bert"), "problem_type='multi"),
        (lambda: with_adapter(["query", "classifier"], init_lora_weights=False), batches_of("bert"), "classifier has an adapter; name"),
        (lambda: bert().to("meta"), with_labels(torch.zeros(6, dtype=torch.long)), "on the meta device"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_said(model: Callable[[], nn.Module], batches: Any, message: str) -> None:
    refused = seeded(model)
    before = weights_of(refused)
    with pytest.raises(ValueError, match=message):
        fit_head(refused, batches)
    if "meta" not in message:
        assert_same_bits(weights_of(refused), before)
    with pytest.raises(ValueError, match="max_rows=0 must be at least 1"):
        fit_head(seeded(bert), batches_of("bert"), max_rows=0)


@pytest.mark.parametrize(
    ("targets", "saved", "is_told"),
    [(["query"], ["classifier"], False), (["query"], None, True), (["query", "classifier"], None, True)],
)
def test_a_head_that_the_files_of_an_adapter_do_not_hold_is_told(
    targets: list[str], saved: list[str] | None, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(lambda: with_adapter(targets, modules_to_save=saved))
    with caplog.at_level(logging.WARNING, "zo_hf"):
        name = fit_head(model, batches_of("bert")).name
    kept = peft.get_peft_model_state_dict(model)
    assert any(key.endswith("classifier.weight") for key in kept) is not is_told
    assert [f"do not hold {name}, " in message for message in caplog.messages] == [True] * is_told


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    batches = [batch | {"labels": batch["labels"].to(dtype)} for batch in batches_of("bert")]
    assert fit_head(seeded(bert), batches) == fit_head(seeded(bert), batches_of("bert"))


def test_the_head_of_a_compiled_model_is_found() -> None:
    model = seeded(bert)
    compiled = torch.compile(model, backend="eager")
    assert fit_head(compiled, batches_of("bert")).name == "_orig_mod.classifier"
    plain = seeded(bert)
    fit_head(plain, batches_of("bert"))
    assert_same_bits(weights_of(model), weights_of(plain))


def test_a_head_of_torchao_is_refused() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = seeded(bert)
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="sharded, offloaded or quantized"):
        fit_head(model, batches_of("bert"))


@pytest.mark.parametrize(
    ("scale", "message"), [(float("nan"), "infinite or not a number"), (1e-3, "too large for torch.float16")]
)
def test_numbers_that_are_not_finite_are_refused_and_never_written(scale: float, message: str) -> None:
    model = seeded(llama).half()
    model.model.norm.weight.data.mul_(scale)
    before = model.score.weight.clone()
    with pytest.raises(ValueError, match=message):
        fit_head(model, batches_of("llama"))
    assert torch.equal(model.score.weight, before)


def test_a_quantized_head_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    model = seeded(bert)
    model.classifier = Linear8bitLt(16, CLASSES, has_fp16_weights=False)
    model.classifier.weight = nn.Parameter(torch.zeros(CLASSES, 16, dtype=torch.int8), requires_grad=False)
    model.classifier.forward = lambda inputs: inputs.new_zeros(*inputs.shape[:-1], CLASSES)
    with pytest.raises(ValueError, match="sharded, offloaded or quantized"):
        fit_head(model, batches_of("bert"))


PROCESS = """
import os, sys, torch
import torch.distributed as dist
from tests.conftest import seeded
from tests.heads.test_fit import batches_of, bert
from zo_hf import fit_head

dist.init_process_group("gloo")
model = seeded(bert)
batches = batches_of("bert")
try:
    fit_head(model, batches if dist.get_rank() else [{"labels": torch.zeros(2)}])
except ValueError as error:
    assert "class numbers" in str(error)
    assert ("failed on rank 0" in str(error)) == (dist.get_rank() == 1)
else:
    raise AssertionError("a process that fails ends all")
shared = torch.nn.parallel.DistributedDataParallel(seeded(bert))
assert fit_head(shared, batches if dist.get_rank() else []).rows == 48, "a process without rows takes part"
found = fit_head(model, batches[dist.get_rank() :: 2])
torch.save((found.rows, model.classifier.state_dict()), f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def test_processes_share_their_rows_and_get_one_head(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(PROCESS)
    run(script, 2, tmp_path)
    (rows, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_bits(first, second)
    alone = seeded(bert)
    batches = batches_of("bert")
    assert fit_head(alone, batches[::2] + batches[1::2]).rows == rows
    torch.testing.assert_close(first["weight"], alone.classifier.weight.data, rtol=1e-4, atol=1e-4)
