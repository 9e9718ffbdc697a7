"""Two blocks of a model are in the memory of the device at a time, and each is loaded once for all probes of a step."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import offload_state_dict
from transformers import AutoConfig

from tests.conftest import causal_batch, seeded, tiny_opt
from tests.offload.models import as_arrays, in_memory, saved
from tests.parallel.launch import Running
from tests.subspaces.helpers import loss_of
from tests.trainer.runs import At, trained
from zo_hf import ZerothOrder
from zo_hf.evaluation import chunked_head
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.memory import Assumptions, plan
from zo_hf.memory.setups import Setup
from zo_hf.memory.trace import MemoryTrace
from zo_hf.offload import OffloadedWeight, offloaded_weights

WIDE: dict[str, Any] = {"hidden_size": 128, "ffn_dim": 512, "word_embed_proj_dim": 128, "num_hidden_layers": 10}


def step(zo: ZerothOrder, optimizer: torch.optim.Optimizer) -> None:
    batch = causal_batch(rows=1, length=4)
    zo.estimate(ModelLoss(zo.model, zo.model, batch, lambda inputs: zo.model(**inputs).loss))
    optimizer.step()


def peak_of_steps(model: Any) -> int:
    """Bytes of all tensors alive at a time during three steps and a fold, beside those that were there before."""
    zo = ZerothOrder(model, "low_rank", rank=1, fold_steps=2, seed=0)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-3))
    step(zo, optimizer)
    kept = [weight.kept() for weight in offloaded_weights(model).values()]  # on the disk, whatever torch counts
    with MemoryTrace([*kept, *(p for p in model.parameters() if not p.is_meta)]) as trace:
        for _ in range(3):
            step(zo, optimizer)
    return trace.peak


def test_two_blocks_are_in_memory_at_a_time(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", **WIDE)
    model = as_arrays(base)
    layer = sum(p.numel() * p.element_size() for p in model.model.decoder.layers[0].parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    without, beyond = peak_of_steps(in_memory(base)), peak_of_steps(model)
    assert 9 * layer < size
    assert beyond - without < 2.2 * layer
    assert beyond > 2 * layer


def test_the_head_is_loaded_once_for_all_chunks_of_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_head, "TOKENS", 8)
    base, batch = saved(tmp_path / "base"), causal_batch()
    batch["labels"] = batch["input_ids"]
    losses = []
    for model in (in_memory(base), as_arrays(base)):
        zo = ZerothOrder(model, "low_rank", rows_per_direction=0, batched_probes=True, seed=0)
        loss = loss_of(model, batch)
        zo.estimate(loss)
        read = count_reads(monkeypatch)
        losses.append(zo.estimate(loss).loss)
    head = offloaded_weights(model)["lm_head.weight"]
    assert loss._checks.in_chunks and losses[0] == losses[1]
    assert read[head] == 2  # tied to the embedding


def test_layers_whose_features_are_known_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_arrays(saved(tmp_path / "base", num_hidden_layers=4))
    read = count_reads(monkeypatch)
    looks = At({8, 10}, lambda state, **_: read.copy())  # the data have 8 batches
    options: dict[str, Any] = {"zo_target_modules": r".*layers[.]3[.].*", "zo_feature_cache_gib": 1.0}
    trained(tmp_path / "run", model, more={"callbacks": [looks]}, max_steps=10, zo_fold_steps=50, **options)
    first, last = looks.results
    later = {name: last[weight] - first[weight] for name, weight in offloaded_weights(model).items()}
    front = {name for name in later if any(f".layers.{layer}." in name for layer in (0, 1, 2))}
    assert len(front) == 3 * 16 and not any(later[name] for name in front)
    assert all(first[offloaded_weights(model)[name]] for name in front)
    assert later["lm_head.weight"]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[OffloadedWeight]:
    read: Counter[OffloadedWeight] = Counter()
    real = OffloadedWeight.value

    def counted(self: OffloadedWeight) -> torch.Tensor:
        read[self] += 1
        return real(self)

    monkeypatch.setattr(OffloadedWeight, "value", counted)
    return read


@pytest.mark.parametrize(("batched", "passes"), [(True, 1), (False, 2)])
def test_a_block_is_loaded_once_for_a_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batched: bool, passes: int
) -> None:
    model = as_arrays(saved(tmp_path / "base", num_hidden_layers=4))
    zo = ZerothOrder(model, "low_rank", rows_per_direction=0, batched_probes=batched, fold_steps=3, seed=0)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-3))
    for _ in range(4):
        step(zo, optimizer)
    read = count_reads(monkeypatch)
    step(zo, optimizer)
    of_layers = {w for name, w in offloaded_weights(model).items() if ".layers." in name}
    assert len(of_layers) == 4 * 16
    assert {read[weight] for weight in of_layers} == {passes}


@pytest.mark.parametrize("rows", [0, 1])
def test_the_plan_counts_what_a_step_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    base = saved(tmp_path / "base", dtype=torch.bfloat16, num_hidden_layers=5)
    given = Assumptions(batch_size=4, sequence_length=12, rows_per_direction=rows, overhead=0)
    (planned,) = plan(AutoConfig.from_pretrained(base), "1GB", given, [Setup("low_rank", "half", streamed=True)]).rows
    model = as_arrays(base)
    zo = ZerothOrder(model, "low_rank", rows_per_direction=rows, batched_probes=not rows, seed=0)
    loss = loss_of(model, causal_batch())
    for _ in range(2):  # from then on the first layer is loaded after the last one
        zo.estimate(loss)
    read = count_reads(monkeypatch)
    zo.estimate(loss)
    assert planned.crosses == sum(count * weight.nbytes for weight, count in read.items())
    weights = {name: weight.nbytes for name, weight in offloaded_weights(model).items()}
    layer = sum(size for name, size in weights.items() if ".layers.0." in name)
    assert planned.weights == 2 * layer + weights["lm_head.weight"]


# glibc may keep large tensors that were freed, as much as a block's of them: a fixed threshold gives them back at once.
LIMITED = """
import ctypes, re, resource, sys
from pathlib import Path
import torch
from accelerate import disk_offload
from tests.conftest import tiny_opt
from tests.offload.test_memory import HUGE
from tests.trainer.runs import trained

M_MMAP_THRESHOLD = -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
way, folder, run, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
trained(run + "-before", tiny_opt(), max_steps=1)  # so that libraries have taken their memory
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
with torch.device("meta"):
    model = tiny_opt(**HUGE)
if way == "disk":
    disk_offload(model, folder, execution_device=torch.device("cpu"))
else:
    model.to_empty(device="cpu")
trained(run, model, max_steps=3, zo_fold_steps=2, per_device_train_batch_size=2)
"""

HUGE: dict[str, Any] = {"hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 1024, "num_hidden_layers": 8}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's own memory")
def test_a_process_that_may_take_half_of_the_models_memory_trains_it(tmp_path: Path) -> None:
    model = seeded(tiny_opt, **HUGE)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    offload_state_dict(tmp_path / "arrays", model.state_dict())
    del model
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    for way, ends in (("memory", False), ("disk", True)):
        process = Running(script, tmp_path / f"{way}.log", way, tmp_path / "arrays", tmp_path / way, size // 2)
        assert (process.wait(300) == 0) == ends, process.said()
        assert ("allocate memory" in process.said()) != ends, process.said()
