"""Peak memory of a real training step, to hold a plan against."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PretrainedConfig

from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss
from zo_hf.memory import Assumptions
from zo_hf.memory.setups import Setup
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full


def real_model(config: PretrainedConfig, setup: Setup, given: Assumptions, device: str = "cpu") -> Any:
    """The setup's model with random weights, with a LoRA adapter where it has one."""
    dtype = torch.float32 if setup.base == "float32" else getattr(torch, given.dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=given.attention).eval()
    model.config.use_cache = False
    if not setup.uses_adapter:
        return model
    from peft import LoraConfig, get_peft_model

    targets = list(given.lora_targets) or None
    return get_peft_model(model, LoraConfig(r=given.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))


def real_batch(given: Assumptions, vocabulary: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tokens; the last positions carry labels, and the first row is shorter than the others."""
    ids = torch.randint(1, vocabulary, (given.batch_size, given.sequence_length), device=device)
    labels = ids.clone()
    labels[:, : given.sequence_length - (given.labels or given.sequence_length)] = -100
    mask = torch.ones_like(ids)
    if given.padded:
        mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def real_steps(model: Any, setup: Setup, given: Assumptions, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Two steps of a setup, from the making of its subspace on."""
    if setup.kind == "LoRA":
        return lambda: backward_steps(model, given, batch)

    def steps() -> None:
        options = {"num_directions": given.num_directions, "batched_probes": given.batched}
        zo = ZerothOrder(model, setup.kind, rows_per_direction=given.rows_per_direction, **options)
        groups = zo.coordinates()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1e-6)
        if isinstance(zo.subspace, Full):
            optimizer = SeededSGD(groups, zo.subspace, lr=1e-6)
        elif given.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=1e-6)
        zo.prepare(optimizer)
        inner = model.get_base_model() if setup.uses_adapter else model
        checks, divides = LossChecks(is_known=True, in_chunks=True), not isinstance(zo.subspace, Full)
        if zo.row_groups is not None:
            zo.row_groups.comes_apart = True  # without the first batch's comparison
        for _ in range(2):
            loss = ModelLoss(model, inner, batch, lambda inputs: model(**inputs).loss, checks=checks, divides=divides)
            zo.estimate(loss)
            optimizer.step()
        zo.finish()

    return steps


def backward_steps(model: Any, given: Assumptions, batch: dict[str, torch.Tensor]) -> None:
    """Two steps with a backward pass, as the stock Trainer takes them in mixed precision."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    for _ in range(2):
        with torch.autocast(batch["input_ids"].device.type, getattr(torch, given.dtype)):
            loss = model(**batch).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()


def peak_of_allocations(steps: Callable[[], None]) -> int:
    """Largest sum of bytes that torch's CPU allocator handed out in `steps` and had not got back, from the profiler.

    Kernels' own scratch space is in it, which a trace of operations does not see.
    """
    gc.collect()  # what an earlier measurement left behind must not be freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
