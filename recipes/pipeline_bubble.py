"""Measure how long the stages of a pipeline wait in a step of training, beside those of GPipe and the formulas of both.

    torchrun --nproc_per_node 2 recipes/pipeline_bubble.py
    torchrun --nproc_per_node 3 recipes/pipeline_bubble.py --output docs/figures/pipeline_bubble_3.json

Every process is a stage with one layer of a tiny model. A layer sleeps before it computes, so that its time does not depend on
how many cores the processes share, and a step is a real one: ZOTrainer, with two probes of every micro-batch. GPipe trains
the same model on the same micro-batches with a backward pass, which takes twice the time of a forward pass. For P passes of t
seconds over S stages, and M micro-batches:

    one way     seconds = t · (P + S − 1)         waiting = (S − 1) / (P + S − 1)        P = 2 · M
    GPipe       seconds = 3 · t · (M + S − 1)     waiting = (S − 1) / (M + S − 1)

The measured shares are 1 − P · t / seconds and 1 − 3 · M · t / seconds. They include all else that a step does: receiving,
updating, and with ZOTrainer logging.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.gpipe_steps import BACKWARD, seconds_of_steps
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_file

TOKENS, ROWS = 8, 2
#: Steps that are not measured: the first one finds out how to evaluate the loss.
WARMUP = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--layer-seconds", type=float, default=0.2, help="time that a layer sleeps in every pass (%(default)s)")
    add("--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8], help="micro-batches of a step (%(default)s)")
    add("--steps", type=int, default=5, help="steps to measure, of which the median counts (%(default)s)")
    add("--output", type=Path, help="JSON file for the results")
    return parser.parse_args()


class Clock(TrainerCallback):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(time.monotonic())


def sleeping(seconds: float, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    time.sleep(seconds)
    return forward(*args, **kwargs)


def model_of(stages: int, seconds: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=stages,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=TOKENS,
        )
    ).eval()
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = functools.update_wrapper(functools.partial(sleeping, seconds, forward), forward)
    return model


def measure(args: argparse.Namespace, stages: int, micro_batches: int) -> dict[str, float]:
    """Return the seconds of a step, and the share of them in which a stage waits, of both schedules beside their formulas."""
    ids = torch.randint(1, 64, (ROWS * micro_batches, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = one_way_seconds(args, stages, micro_batches, ids)
    model = model_of(stages, args.layer_seconds)
    steps = seconds_of_steps(model, ids, micro_batches, args.steps + WARMUP, args.layer_seconds)[WARMUP:]
    gpipe_seconds = statistics.median(steps)
    passes = 2 * micro_batches
    return {
        "stages": stages,
        "micro_batches": micro_batches,
        "passes": passes,
        "seconds": seconds,
        "waiting": 1 - passes * args.layer_seconds / seconds,
        "formula": (stages - 1) / (passes + stages - 1),
        "gpipe_seconds": gpipe_seconds,
        "gpipe_waiting": 1 - (1 + BACKWARD) * micro_batches * args.layer_seconds / gpipe_seconds,
        "gpipe_formula": (stages - 1) / (micro_batches + stages - 1),
    }


def one_way_seconds(args: argparse.Namespace, stages: int, micro_batches: int, ids: torch.Tensor) -> float:
    """Return the median seconds of a step of ZOTrainer on the rows `ids`, (rows, tokens)."""
    rows = [{"input_ids": row, "labels": row} for row in ids] * (args.steps + WARMUP)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = ZOConfig(
            folder,
            zo_parallel="pipeline",
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=micro_batches,
            max_steps=args.steps + WARMUP,
            zo_check_steps=0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = ZOTrainer(model_of(stages, args.layer_seconds), config, train_dataset=rows, callbacks=[clock])
        trainer.train()
    times = clock.times[WARMUP - 1 :]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        f"{'stages':>6} {'micro-batches':>13} {'s/step':>7} {'waiting':>8} {'formula':>8} {'GPipe, s/step':>14} {'waiting':>8} "
        f"{'formula':>8}"
    ]
    lines += [
        f"{row['stages']:>6} {row['micro_batches']:>13} {row['seconds']:>7.2f} {row['waiting']:>8.1%} {row['formula']:>8.1%} "
        f"{row['gpipe_seconds']:>14.2f} {row['gpipe_waiting']:>8.1%} {row['gpipe_formula']:>8.1%}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.output is not None:
        check_file("--output", args.output)
    stages = ZOConfig("unused", use_cpu=True, report_to=[]).world_size
    rows = [measure(args, stages, micro_batches) for micro_batches in args.micro_batches]
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    print(table(rows))
    if args.output is not None:
        setup = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
