# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,quantization]"]
# ///
"""Measure the rounding error of projected gradients if probes used the forward pass of an 8-bit model.

    python recipes/int8_probe_noise.py                    # SmolLM2-135M, embedded; needs no hub
    python recipes/int8_probe_noise.py --model MODEL

The int8 layers of bitsandbytes also round their inputs to integers. This recipe computes the projected gradients along
the same directions with that forward pass, and with the exact product that probes use. It prints a table for several
distances.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common.experiments import encoded_reviews
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from zo_hf import ZerothOrder
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.quantization import quantized_layers
from zo_hf.quantization.bitsandbytes_int8 import BitsAndBytesInt8
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_file


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--model", help="a causal language model, a folder or a name; default: the embedded SmolLM2-135M"
    )
    parser.add_argument("--directions", type=int, default=12, help="number of directions (%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="sentences in the batch (%(default)s)")
    distances = [1e-4, 1e-3, 1e-2]
    parser.add_argument("--distances", type=float, nargs="+", default=distances, help="distances ε (%(default)s)")
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args()
    if args.output is not None:
        check_file("--output", args.output)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about every cast of an input

    path = args.model or str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="auto", dtype=torch.float32
    ).eval()
    sentences, _ = encoded_reviews(tokenizer, args.rows, args.rows, 0, words=range(8, 13))
    batch = LabelWordCollator(tokenizer, model)(list(sentences))
    lines = ["| ε | c, root mean square | error of the rounded c | correlation |", "|---:|---:|---:|---:|"]
    for eps in tqdm(args.distances, unit="distance"):
        exact = projected_gradients(model, batch, eps, args.directions)
        with probes_round_inputs():
            rounded = projected_gradients(model, batch, eps, args.directions)
        error = (rounded - exact).square().mean().sqrt()
        correlation = torch.corrcoef(torch.stack((exact, rounded)))[0, 1]
        lines.append(f"| {eps:g} | {exact.square().mean().sqrt():.1f} | {error:.1f} | {correlation:.2f} |")
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def probes_round_inputs() -> Iterator[None]:
    """Make probes use the layers' own forward pass, which rounds inputs, while the context is open."""
    before = BitsAndBytesInt8.rounds_activations
    BitsAndBytesInt8.rounds_activations = False
    try:
        yield
    finally:
        BitsAndBytesInt8.rounds_activations = before


def projected_gradients(model: torch.nn.Module, batch: dict, eps: float, directions: int) -> torch.Tensor:
    """Return c along the first directions of seed 0, (directions,), float64."""
    assert quantized_layers(model), "the model has no quantized layers"
    zo = ZerothOrder(model, "low_rank", eps=eps, num_directions=directions, batched_probes=False, seed=0)
    estimate = zo.estimate(ModelLoss(model, model, batch, lambda inputs: model(**inputs).loss))
    zo.finish()
    return torch.tensor(estimate.projected_gradients, dtype=torch.float64)


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
