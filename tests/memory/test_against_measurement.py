"""The plan against real steps: what torch's allocator handed out, and what the process held."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig

from tests.memory.measured import peak_of_allocations, real_batch, real_model, real_steps, tensor_bytes
from zo_hf.engine import ZerothOrder
from zo_hf.memory import Assumptions, plan
from zo_hf.memory.measure import rows_of_passes
from zo_hf.memory.peak import MIB, PeakMemory
from zo_hf.memory.setups import Setup

SMALL = {
    "llama": LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=2000,
    ),
    "opt": OPTConfig(
        hidden_size=192,
        ffn_dim=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        vocab_size=2000,
        word_embed_proj_dim=192,
    ),
    "gpt2": GPT2Config(
        n_embd=192, n_layer=4, n_head=6, vocab_size=2000, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
    ),
}
# The shapes of SmolLM2-135M, OPT-125M and GPT-2: 124 to 135 million parameters.
REAL = {
    "llama": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "opt": OPTConfig(),
    "gpt2": GPT2Config(),
}
TINY = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
GIVEN = Assumptions(batch_size=4, sequence_length=64, rows_per_direction=0, overhead=0)
SETUPS = [Setup("low_rank", "float32"), Setup("full", "float32"), Setup("adapter", "float32")]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def predicted(config: Any, setup: Setup, given: Assumptions) -> tuple[int, int]:
    """Bytes of the weights, and of everything at the peak."""
    row = plan(config, "1GB", given, setups=[setup]).rows[0]
    return row.weights, row.total


def as_planned(setup: Setup, given: Assumptions) -> Assumptions:
    """By rows, a plan with "auto" counts a pass for each sign, which is what a device without room for both makes."""
    goes_by_rows = given.rows_per_direction != 0 and not (setup.kind == "full" and given.rows_per_direction == "auto")
    return replace(given, batched=False) if goes_by_rows and given.batched == "auto" else given


def measured(config: Any, setup: Setup, given: Assumptions) -> tuple[int, int]:
    """Bytes of the weights, and of these with the allocator's peak."""
    given = as_planned(setup, given)
    model = real_model(config, setup, given)
    batch = real_batch(given, config.vocab_size)
    if setup.needs_backward:
        batch["labels"] = batch["input_ids"]
    weights = tensor_bytes(model)
    return weights, weights + peak_of_allocations(real_steps(model, setup, given, batch))


def assert_close(config: Any, setup: Setup, given: Assumptions, beyond_weights: float = 0.05) -> None:
    weights, peak = predicted(config, setup, given)
    real_weights, real_peak = measured(config, setup, given)
    assert weights == real_weights
    assert peak == pytest.approx(real_peak, rel=0.1)
    assert peak - weights == pytest.approx(real_peak - real_weights, rel=beyond_weights)


@pytest.mark.parametrize(
    ("name", "setup"),
    [
        pytest.param(name, setup, id=f"{name}-{setup.kind}", marks=[pytest.mark.slow] * (slow and name != "llama"))
        for name in SMALL
        for setup, slow in zip(SETUPS, (False, True, False), strict=True)
    ],
)
def test_the_plan_is_what_the_allocator_hands_out(name: str, setup: Setup) -> None:
    assert_close(SMALL[name], setup, GIVEN)


@pytest.mark.parametrize(
    "given",
    [
        replace(GIVEN, labels=None, padded=False),
        replace(GIVEN, labels=None, batch_size=8, sequence_length=80),
        replace(GIVEN, labels=10, attention="eager"),
        replace(GIVEN, batched=False, batch_size=1, sequence_length=256),
        replace(GIVEN, num_directions=3, optimizer="adamw"),
        replace(GIVEN, rows_per_direction=1),
        replace(GIVEN, rows_per_direction=1, batched=True),
    ],
    ids=[
        "all labels, unpadded",
        "all labels, in chunks",
        "ten labels, eager",
        "sequential, long",
        "directions, adamw",
        "rows",
        "rows, both signs in one pass",
    ],
)
def test_the_assumptions_count_as_they_do_in_a_real_step(given: Assumptions) -> None:
    assert_close(SMALL["llama"], SETUPS[0], given)


@pytest.mark.parametrize("kind", ["low_rank", "full"])
@pytest.mark.parametrize("rows_per_direction", ["auto", 2, 0])
@pytest.mark.parametrize("batched", ["auto", True, False])
def test_the_passes_are_those_that_the_engine_makes(
    kind: str, rows_per_direction: int | str, batched: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(GIVEN, rows_per_direction=rows_per_direction, batched=batched, sequence_length=8)
    assert_same_passes(Setup(kind, "float32"), given, monkeypatch)


@pytest.mark.parametrize("kind", ["low_rank", "adapter"])
def test_the_passes_of_several_directions_are_those_that_the_engine_makes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(GIVEN, rows_per_direction="auto", num_directions=2, sequence_length=8)
    assert_same_passes(Setup(kind, "float32"), given, monkeypatch)


@pytest.mark.parametrize("rows_per_direction", ["auto", 2])
def test_a_cpu_takes_one_pass_by_rows(rows_per_direction: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Assumptions.batched` says: it cannot tell whether there is memory for that."""
    given = replace(GIVEN, rows_per_direction=rows_per_direction, sequence_length=8)
    setup, in_one_pass = Setup("low_rank", "float32"), replace(given, batched=True)
    (passes, _) = passes_of_last_step(setup, given, monkeypatch)
    assert tuple(passes) == plan(TINY, "1GB", in_one_pass, [setup]).rows[0].passes == (2 * given.batch_size,)


def assert_same_passes(setup: Setup, given: Assumptions, monkeypatch: pytest.MonkeyPatch) -> None:
    made, counted = passes_of_last_step(setup, as_planned(setup, given), monkeypatch)
    planned = plan(TINY, "1GB", given, [setup]).rows[0].passes
    assert planned == tuple(made)
    assert sum(planned) == counted * given.batch_size, "a step counts an evaluation of the batch for each probe"


def passes_of_last_step(
    setup: Setup, given: Assumptions, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sequence[int], int]:
    """The rows of every forward pass, and the number of passes that the engine counts."""
    model = real_model(TINY, setup, given)
    made, counted, estimate = [], [], ZerothOrder.estimate

    def watched(zo: ZerothOrder, closure: Any) -> Any:
        before = zo.forward_passes
        with rows_of_passes(model.get_base_model() if setup.uses_adapter else model) as passes:
            found = estimate(zo, closure)
        made.append(passes)
        counted.append(zo.forward_passes - before)
        return found

    monkeypatch.setattr(ZerothOrder, "estimate", watched)
    real_steps(model, setup, given, real_batch(given, TINY.vocab_size))()
    return made[-1], counted[-1]


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_half_precision_counts_the_scratch_of_rounding(kind: str) -> None:
    assert_close(SMALL["llama"], Setup(kind, "half"), GIVEN)


@pytest.mark.slow
def test_rows_that_are_asked_for_count_for_all_weights_as_well() -> None:
    """Of the noise of two directions, a pass holds one tile at a time."""
    assert_close(SMALL["llama"], SETUPS[1], replace(GIVEN, rows_per_direction=1, batch_size=8), beyond_weights=0.02)


@pytest.mark.parametrize("name", SMALL)
def test_a_backward_pass_is_planned_as_it_is(name: str) -> None:
    assert_close(SMALL[name], Setup("LoRA", "half"), GIVEN)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setup"), list(zip(REAL, SETUPS, strict=True)), ids=str)
def test_the_plan_of_real_shapes_is_what_the_allocator_hands_out(name: str, setup: Setup) -> None:
    assert_close(REAL[name], setup, GIVEN)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, PeakMemory measures that instead of the process"
)
@pytest.mark.parametrize(("name", "setup"), list(zip(REAL, SETUPS[:2], strict=False)), ids=str)
def test_the_process_holds_what_the_plan_says(name: str, setup: Setup) -> None:
    _, peak = predicted(REAL[name], setup, GIVEN)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_resident_set, args=(name, setup, send))
    child.start()
    send.close()
    grown = receive.recv()
    child.join()
    print(f"planned {peak / 1e6:.1f} MB, grown by {grown / 1e6:.1f} MB")
    assert peak == pytest.approx(grown, rel=0.1)


def _resident_set(name: str, setup: Setup, send: Any) -> None:
    """Growth of the process from before the model is made, in bytes, after a small model has loaded the libraries."""
    torch.set_num_threads(1)
    _make_steps(SMALL[name], setup)()
    with PeakMemory() as before:
        pass
    steps = _make_steps(REAL[name], setup)  # outside of what is measured: a tied head is made, and then dropped
    with PeakMemory() as peak:
        steps()
    send.send((peak.mib - before.mib) * MIB)


def _make_steps(config: Any, setup: Setup) -> Callable[[], None]:
    model = real_model(config, setup, GIVEN)
    return real_steps(model, setup, GIVEN, real_batch(GIVEN, config.vocab_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup", [*SETUPS, Setup("low_rank", "half"), Setup("LoRA", "half")], ids=lambda setup: setup.kind
)
@pytest.mark.parametrize("device", [device for device in DEVICES if device == "cuda"])
def test_the_plan_is_what_a_gpu_allocates(device: str, setup: Setup) -> None:
    given = replace(GIVEN, sequence_length=256)
    _, peak = predicted(REAL["llama"], setup, given)
    model = real_model(REAL["llama"], setup, given, device)
    steps = real_steps(model, setup, given, real_batch(given, REAL["llama"].vocab_size, device))
    with PeakMemory() as measured_peak:
        steps()
    assert peak == pytest.approx(measured_peak.mib * MIB, rel=0.1)
