# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf"]
# ///
"""Time a training step whose weights are loaded block by block, beside a step with the weights in memory.

    python recipes/streamed_weights.py
    python recipes/streamed_weights.py --length 256

The model has OPT-125M's shape and random weights, so no hub is needed. The recipe prints the processor time and the time on
the clock of a step and of a step that folds, and their ratios to those in memory. The weights are on the disk, or apart from
the device in the CPU's memory. The system may keep files in memory that it has read before.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from common.timed_steps import RandomRows, Seconds, StepClock
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.tasks.command_line import CommandParser

ROWS = 8
WAYS = ("in memory", "apart, in the CPU's memory", "on the disk")
#: Steps before those that count, and the step that folds.
NEW, FOLD = 2, 5


def loaded(way: str, folder: Path) -> Any:
    """Load the model of a folder."""
    if way == "on the disk":
        return OPTForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=str(folder / "offload"))
    model = OPTForCausalLM.from_pretrained(folder)
    return model if way == "in memory" else cpu_offload(model, torch.device("cpu"))


def step_times(way: str, folder: Path, length: int) -> list[Seconds]:
    """Return the seconds of the steps, the last of which folds."""
    args = ZOConfig(
        str(folder / "run"),
        max_steps=FOLD,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-6,
        zo_rows_per_direction=0,
        zo_batched_probes=True,
        zo_fold_steps=FOLD,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    clock = StepClock()
    ZOTrainer(loaded(way, folder), args, train_dataset=RandomRows(ROWS, length), callbacks=[clock]).train()
    return clock.steps[NEW:]


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--length", type=int, default=48, help="tokens in a row (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps: dict[str, list[Seconds]] = {way: [] for way in WAYS}
    folds: dict[str, list[Seconds]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        OPTForCausalLM(OPTConfig(max_position_embeddings=max(2048, args.length))).save_pretrained(folder)
        for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
            for way in WAYS:
                *plain, fold = step_times(way, Path(folder), args.length)
                steps[way] += plain
                folds[way].append(fold)
    print(
        "| weights | step, processor ms | x in memory | step, clock ms | a step that folds, processor ms | x in memory |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    (first, _), (first_fold, _) = medians(steps[WAYS[0]]), medians(folds[WAYS[0]])
    for way in WAYS:
        (step, on_clock), (fold, _) = medians(steps[way]), medians(folds[way])
        cells = f"{1000 * step:.0f} | {step / first:.2f} | {1000 * on_clock:.0f} | {1000 * fold:.0f} | {fold / first_fold:.2f}"
        print(f"| {way} | {cells} |")


def medians(seconds: list[Seconds]) -> tuple[float, float]:
    """Return the medians of processor times and of times on the clock."""
    processor, clock = zip(*seconds, strict=True)
    return statistics.median(processor), statistics.median(clock)


if __name__ == "__main__":
    main()
