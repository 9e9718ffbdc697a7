# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf"]
# ///
"""Time a training step in which only the last layers move, with and without their features from a cache.

    python recipes/last_layers.py
    python recipes/last_layers.py --rows-per-direction 1

The model has OPT-125M's shape and random weights, so no hub is needed. The recipe prints the processor time of a step,
after the features of all rows are known, and its ratio to a step in which all layers move.
"""

from __future__ import annotations

import statistics
import tempfile

import torch
from common.timed_steps import RandomRows, StepClock
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.tasks.command_line import CommandParser

LAYERS, ROWS, LENGTH = 12, 8, 48
#: Layers that move, and GiB for features.
CASES = ((LAYERS, 0), (6, 0), (6, 1), (3, 0), (3, 1), (1, 0), (1, 1))
#: Steps whose rows are new, and steps that count.
NEW, COUNTED = 3, 3


def step_times(model: OPTForCausalLM, last: int, gib: float, rows_per_direction: int) -> list[float]:
    """Return the processor seconds of the steps that count, with the last layers moving."""
    moving = "|".join(str(layer) for layer in range(LAYERS - last, LAYERS))
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(
            folder,
            max_steps=NEW + COUNTED,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-6,
            zo_rows_per_direction=rows_per_direction,
            zo_target_modules=rf".*layers[.]({moving})[.].*",
            zo_exclude_modules=".*norm.*",
            zo_feature_cache_gib=gib,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        clock = StepClock()
        ZOTrainer(model, args, train_dataset=RandomRows(2 * ROWS, LENGTH), callbacks=[clock]).train()
    return [step.processor for step in clock.steps[NEW:]]


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--rows-per-direction", type=int, default=0, help="zo_rows_per_direction (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=LAYERS)).eval()
    times: dict[tuple[int, int], list[float]] = {case: [] for case in CASES}
    for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
        for last, gib in CASES:
            times[last, gib] += step_times(model, last, gib, args.rows_per_direction)
    whole = statistics.median(times[CASES[0]])
    print("| layers that move | cache | ms | x all layers |\n|---:|---|---:|---:|")
    for (last, gib), seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {last} | {'yes' if gib else 'no'} | {1000 * median:.0f} | {median / whole:.2f} |")


if __name__ == "__main__":
    main()
