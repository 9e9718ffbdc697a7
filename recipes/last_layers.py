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
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.tasks.command_line import CommandParser

LAYERS, ROWS, LENGTH = 12, 8, 48
#: Layers that move, and GiB for features.
CASES = ((LAYERS, 0), (6, 0), (6, 1), (3, 0), (3, 1), (1, 0), (1, 1))
#: Steps whose rows are new, and steps that count.
NEW, COUNTED = 3, 3


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Two batches of random tokens, of which the last is a label."""

    def __len__(self) -> int:
        return 2 * ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(7, 50_000, (LENGTH,), generator=torch.Generator().manual_seed(index))
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Clock(TrainerCallback):
    """Notes the processor time of every step, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def step_times(model: OPTForCausalLM, last: int, gib: float, rows_per_direction: int) -> list[float]:
    """Return the seconds of the steps that count, with the last layers moving."""
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
        clock = Clock()
        ZOTrainer(model, args, train_dataset=Rows(), callbacks=[clock]).train()
    return clock.seconds[NEW:]


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
