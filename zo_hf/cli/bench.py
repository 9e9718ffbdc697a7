"""Measure the cost of a forward-only step, compared with a bare forward pass and with the textbook MeZO loop.

    zo-hf bench                                                     OPT-125M's shape on one CPU thread
    zo-hf bench --shape opt-1.3b --dtype bfloat16 --rows 16 --length 64 --device cuda
    zo-hf bench --quantization int8                                 the same for an 8-bit model of bitsandbytes

Weights are random, because the cost depends only on shapes. In every round, each variant is timed once. The table shows
medians of process CPU time on a CPU, and of elapsed time on a GPU. The bare forward pass takes the rows of both probes of
a step, and computes logits at the last position, as the steps do. Peak memory is measured in a separate process for each
variant; on a CPU it includes libraries. `noise` is the percentage of a step that draws directions, measured in separate
steps. The variants with `rows` have a direction for every row, and those with `graph` need a CUDA device.

`adapter` is a LoRA adapter of rank 8 on all linear layers. With a quantized model, `forward-exact` is the forward pass
without rounding of the inputs, which probes need, and `low_rank` never folds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zo_hf.cli.bench_steps import GRAPH_VARIANTS, QUANTIZED_VARIANTS, SHAPES, VARIANTS, Step, build, variants
from zo_hf.memory.peak import PeakMemory
from zo_hf.trainer.output_paths import check_file

#: Methods by which a distribution draws.
_DRAWS = ("draw_layouts", "draw_slice", "draw_rows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf bench`."""
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m", help="shape of the model (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch (%(default)s)")
    parser.add_argument("--length", type=int, default=48, help="tokens in a row (%(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of the weights (%(default)s)")
    parser.add_argument(
        "--quantization", choices=("int8", "nf4"), help="format of the linear layers, by bitsandbytes (none)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of every variant (%(default)s)")
    names = list(VARIANTS | GRAPH_VARIANTS | QUANTIZED_VARIANTS)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"variants to measure, among {', '.join(names)} (all that apply)",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the results; a plot is saved next to it")


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    _check(args)
    args.variants = ["forward", *(name for name in args.variants or variants(args) if name != "forward")]
    seconds, noise = measure_time(args)
    memory = {name: measure_memory(args, name) for name in tqdm(args.variants, "memory", disable=None)}
    forward_time, forward_memory = seconds["forward"], memory["forward"]
    rows = [
        {
            "variant": name,
            "milliseconds": statistics.median(seconds[name]) * 1e3,
            "times_forward": statistics.median(a / b for a, b in zip(seconds[name], forward_time, strict=True)),
            "noise_percent": 100 * statistics.median(noise[name]) if noise[name] else None,
            "peak_mib": memory[name],
            "peak_over_forward": memory[name] / forward_memory,
        }
        for name in args.variants
    ]
    print(table(rows))
    if args.output is not None:
        write(args, rows)


def _check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is measured.

    Raises:
        ValueError: an option cannot work; the message names it and the way out.
    """
    for option, least in (("rounds", 1), ("rows", 1), ("threads", 1), ("length", 2)):
        if vars(args)[option] < least:
            raise ValueError(f"--{option} {vars(args)[option]} must be at least {least}.")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device} is not a device of this benchmark; use --device cpu or cuda.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device} is not available; use --device cpu.")
    known = variants(args)
    wrong = [name for name in args.variants or () if name not in known]
    if wrong:
        raise ValueError(f"--variants {wrong[0]} does not apply to this model; choose among {', '.join(known)}.")
    if args.output is not None:
        if args.output.suffix == ".png":
            raise ValueError(f"--output {args.output} is for JSON, and the plot is saved next to it; use .json.")
        for path in (args.output, args.output.with_suffix(".png")):
            check_file("--output", path)


def measure_time(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of every variant in every round, and the parts of a step in which it draws noise, if it does."""
    torch.set_num_threads(args.threads)
    model, batch = build(args)
    clock = time.process_time if args.device == "cpu" else _cuda_clock
    steps = {name: variants(args)[name](model, batch) for name in args.variants}
    seconds: dict[str, list[float]] = {name: [] for name in args.variants}
    for round_ in tqdm(range(args.rounds + 1), "time", disable=None):
        for name in args.variants:
            with steps[name].attached():
                start = clock()
                steps[name]()
                if round_ > 0:  # the first round warms up
                    seconds[name].append(clock() - start)
    drawing = {name: step for name, step in steps.items() if step.distribution is not None}
    noise = {name: [noise_share(step, clock) for _ in range(args.rounds)] for name, step in drawing.items()}
    return seconds, {name: noise.get(name, []) for name in args.variants}


def noise_share(step: Step, clock: Callable[[], float]) -> float:
    """Return the part of a step's time in which it draws its directions."""
    spent, distribution = 0.0, step.distribution

    def timed(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed_draw(*args: Any) -> Tensor:
            nonlocal spent
            start = clock()
            noise = draw(*args)
            spent += clock() - start
            return noise

        return timed_draw

    for name in _DRAWS:
        setattr(distribution, name, timed(getattr(distribution, name)))
    try:
        with step.attached():
            start = clock()
            step()
            return spent / (clock() - start)
    finally:
        for name in _DRAWS:
            delattr(distribution, name)


def measure_memory(args: argparse.Namespace, name: str) -> float:
    """Return the peak memory of two steps of a variant in MiB: resident set on a CPU, allocated by torch on a GPU."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_memory_child, args=(args, name, send))
    child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise ValueError(
            f"the process that measured --variants {name} ended early, probably out of memory; use a smaller --shape "
            "or fewer --rows."
        ) from None
    finally:
        child.join()


def _memory_child(args: argparse.Namespace, name: str, send: Any) -> None:
    torch.set_num_threads(args.threads)
    model, batch = build(args)
    step = variants(args)[name](model, batch)
    del model
    with PeakMemory() as peak, step.attached():
        step()
        step()
    send.send(peak.mib)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a table."""
    lines = [f"{'variant':<26}{'ms/step':>10}{'x forward':>11}{'noise %':>9}{'peak MiB':>10}{'x forward':>11}"]
    for row in rows:
        noise = "-" if row["noise_percent"] is None else f"{row['noise_percent']:.1f}"
        lines.append(
            f"{row['variant']:<26}{row['milliseconds']:>10.1f}{row['times_forward']:>11.2f}{noise:>9}"
            f"{row['peak_mib']:>10.0f}{row['peak_over_forward']:>11.2f}"
        )
    return "\n".join(lines)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the results and the measurement's setup to `args.output`, and a bar chart next to it."""
    names = ("shape", "rows", "length", "dtype", "device", "quantization", "threads", "rounds")
    setup = {name: getattr(args, name) for name in names}
    hardware = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    args.output.write_text(json.dumps({"setup": {**setup, "hardware": hardware}, "rows": rows}, indent=1) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True)
    labels = [row["variant"] for row in rows]
    for axis, key, title in zip(
        axes,
        ("times_forward", "peak_over_forward"),
        ("time / bare forward", "peak memory / bare forward"),
        strict=True,
    ):
        bars = axis.barh(labels, [row[key] for row in rows])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.set_xlabel(title)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    weights = args.dtype if args.quantization is None else f"{args.quantization} and {args.dtype}"
    figure.suptitle(f"{args.shape}, {args.rows} x {args.length} tokens, {weights}, {hardware}")
    figure.tight_layout()
    figure.savefig(args.output.with_suffix(".png"), dpi=120)


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
