"""Plan memory: print the peak memory of every training setup of a model, from its config alone. Only the config is
downloaded, and no weight is ever allocated.

    zo-hf plan meta-llama/Meta-Llama-3-8B --gpu-memory 24GB
    zo-hf plan path/to/config.json --gpu-memory 16GiB --batch-size 4 --sequence-length 1024
    zo-hf plan                                       the embedded default model

MODEL is a name on the hub, a config.json, or a folder with one. Each row is a training setup. The setup names the
zo_subspace to train with, and the base is the format of the model's weights. `streamed` stands for a model that is loaded
with a device_map, see docs/guides/speed_and_memory.md:

    llama on 24.0 GB; sizes in GB

    setup                 base           moves   passes  weights   state  working    total   fits
    inference             bfloat16           -    1 x 8    16.06    0.00     1.03    18.09   yes    5.91 left
    low_rank              bfloat16        6.8M    2 x 8    16.06    0.52     0.49    18.07   yes    5.93 left
    low_rank              nf4             5.5M    2 x 8     6.03    0.42     0.49     7.94   yes   16.06 left
    full                  bfloat16        8.0B   1 x 16    16.06    0.00     0.98    18.04   yes    5.96 left
    adapter               bfloat16        1.3M    2 x 8    16.07    0.09     0.49    17.66   yes    6.34 left
    adapter               nf4             1.3M    2 x 8     6.04    0.09     0.49     7.62   yes   16.38 left
    adapter               nf4 double      1.3M    2 x 8     5.72    0.09     0.49     7.30   yes   16.70 left
    low_rank, streamed    bfloat16        6.8M    2 x 8     1.92    0.52     0.49     3.93   yes   20.07 left, 32.1 to load a step

    for comparison, with a backward pass:
    LoRA, checkpointing   bfloat16        3.4M    1 x 8    16.07    0.04     7.43    24.55   no     0.55 missing
    QLoRA, checkpointing  nf4 double      3.4M    1 x 8     5.72    0.04     7.43    14.19   yes    9.81 left
    AdamW, checkpointing  float32         8.0B    1 x 8    32.12   96.36     0.07   129.55   no   105.55 missing

    moves    number of trained values: coordinates, adapter weights, or all weights
    passes   forward passes of a step, and the rows of each
    weights  the model in the base format, with its adapter
    state    memory kept from step to step: coordinates, directions, gradients, optimizer
    working  memory beyond that at the peak of a step: activations, logits, scratch
    total    the sum, with the overhead; "fits" shows how much GPU memory is left, or missing
    streamed weights stay off the GPU, and are loaded layer by layer; the last number is the GB that a step loads

One step of each setup runs on tensors that have a shape and no values, and the sizes of all live storages are added up. In
float32 on a CPU, the result agrees with the peak of torch's allocator within 1 %. int8 and nf4 are modeled after
bitsandbytes. Nothing has been measured on a GPU. GB is 10⁹ bytes and GiB is 2³⁰; a card sold as 24 GB has about 24 GiB.
"""

from __future__ import annotations

import argparse
import logging
import warnings

from zo_hf.memory.assumptions import ATTENTION, HALF_DTYPES, OPTIMIZER_COPIES, Assumptions
from zo_hf.memory.model import load_config
from zo_hf.memory.plan import Plan, Row, plan
from zo_hf.memory.size import GB, parse_size

DEFAULTS = Assumptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf plan`."""
    add = parser.add_argument
    add(
        "model", nargs="?", metavar="MODEL", help="folder, config.json or name on the hub; default: the embedded model"
    )
    add("--gpu-memory", default="24GB", metavar="SIZE", help="memory of the GPU, such as 24GB or 16GiB (%(default)s)")
    add("--batch-size", type=int, default=DEFAULTS.batch_size, help="rows in a batch (%(default)s)")
    add("--sequence-length", type=int, default=DEFAULTS.sequence_length, help="tokens in a row (%(default)s)")
    add("--dtype", default=DEFAULTS.dtype, choices=HALF_DTYPES, help="dtype of half-precision weights (%(default)s)")
    add(
        "--labels",
        default=str(DEFAULTS.labels),
        help="number of positions with a label at the end of a row, or all; logits are computed only there (%(default)s)",
    )
    add("--no-padding", action="store_true", help="all rows have the same length, so no mask is needed")
    add("--attention", default=DEFAULTS.attention, choices=ATTENTION, help="eager stores the scores (%(default)s)")
    add("--rank", type=int, default=DEFAULTS.rank, help="rank of the factors of low_rank, zo_rank (%(default)s)")
    add(
        "--num-directions",
        type=int,
        default=DEFAULTS.num_directions,
        help="number of directions q; a two-point step has 2q probes (%(default)s)",
    )
    add(
        "--rows-per-direction",
        default=str(DEFAULTS.rows_per_direction),
        help="rows that share directions, zo_rows_per_direction: a number, 0 for all, or auto (%(default)s)",
    )
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument(
        "--one-after-another",
        action="store_true",
        help="one forward pass for each probe, zo_batched_probes=False; this is the default if groups of rows have their "
        "own directions",
    )
    passes.add_argument(
        "--in-one-pass",
        action="store_true",
        help="one forward pass for all probes, zo_batched_probes=True; this is the default if all rows share directions, and "
        "what a run on a CPU does",
    )
    directions = ("gaussian", "rademacher")
    add("--direction", default=DEFAULTS.direction, choices=directions, help="distribution of directions (%(default)s)")
    add(
        "--optimizer",
        default=DEFAULTS.optimizer,
        choices=OPTIMIZER_COPIES,
        help="optimizer of the coordinates (%(default)s)",
    )
    add("--lora-rank", type=int, default=DEFAULTS.lora_rank, help="rank of LoRA adapters (%(default)s)")
    add(
        "--lora-targets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules with an adapter, or all-linear; default: PEFT's choice for the model",
    )
    add(
        "--overhead",
        default="1GB",
        metavar="SIZE",
        help="memory of the CUDA context, libraries and allocator (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    given = Assumptions(
        batch_size=args.batch_size,
        sequence_length=args.sequence_length,
        dtype=args.dtype,
        labels=_labels(args.labels),
        padded=not args.no_padding,
        attention=args.attention,
        rank=args.rank,
        num_directions=args.num_directions,
        rows_per_direction=_rows(args.rows_per_direction),
        batched=_batched(args),
        direction=args.direction,
        optimizer=args.optimizer,
        lora_rank=args.lora_rank,
        lora_targets=tuple(args.lora_targets),
        overhead=_overhead(args.overhead),
    )
    gpu_memory = parse_size(args.gpu_memory)
    config = load_config(args.model if args.model is not None else _embedded_model())
    # A traced step warns about things that do not matter for it, such as missing kernels.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(text(plan(config, gpu_memory, given)))


def text(result: Plan) -> str:
    """Return the text of a plan: the table, then every assumption."""
    sizes = f"{'weights':>9}{'state':>8}{'working':>9}{'total':>9}"
    head = f"{'setup':<22}{'base':<12}{'moves':>8} {'passes':>8}{sizes}   fits"
    lines = [f"{result.model} on {result.gpu_memory / GB:.1f} GB; sizes in GB", "", head]
    group = None
    for row in result.rows:
        if row.setup.needs_backward and group != "backward":
            group = "backward"
            lines += ["", "for comparison, with a backward pass:"]
        lines.append(_line(row))
    return "\n".join([*lines, "", *_assumptions(result)])


def _line(row: Row) -> str:
    sizes = "".join(
        f"{size / GB:>{width}.2f}"
        for size, width in ((row.weights, 9), (row.state, 8), (row.working, 9), (row.total, 9))
    )
    headroom = f"{'yes' if row.fits else 'no ':<3} {abs(row.headroom) / GB:7.2f} {'left' if row.fits else 'missing'}"
    crosses = f", {row.crosses / GB:.1f} to load a step" if row.crosses else ""
    moves, passes = _count(row.moves), f"{len(row.passes)} x {row.passes[0]}"
    return f"{_title(row):<22}{row.base:<12}{moves:>8} {passes:>8}{sizes}   {headroom}{crosses}"


def _title(row: Row) -> str:
    more = ", checkpointing" * row.setup.checkpointing + ", streamed" * row.setup.streamed
    return row.setup.kind + more


def _count(number: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}"
    return str(number) if number else "-"


def _assumptions(result: Plan) -> list[str]:
    given = result.assumptions
    labels = "every position" if given.labels is None else f"the last {given.labels} position(s)"
    one_after_another = f"{given.probes} probes, one after another"
    together = f"all {given.probes} probes in one forward pass, which holds {given.probes} times the activations"
    probes, groups = together if given.batched else one_after_another, ""
    if given.rows_per_direction:
        groups = f" for each of {given.groups} groups of rows, which the step holds"
        groups += f"; full and scales: {probes}, for all rows" if given.rows_per_direction == "auto" else ""
        probes = f"{one_after_another} (a CPU takes --in-one-pass)" if given.batched == "auto" else probes
    targets = ", ".join(given.lora_targets) or "PEFT's choice"
    lines = [
        f"batch: {given.batch_size} rows of {given.sequence_length} tokens, "
        + ("padded, with a mask" if given.padded else "all of the same length, without a mask"),
        f"labels: at {labels}; a zeroth-order step computes logits only there (everywhere if that is more than half)",
        f"a step: {probes}; {given.num_directions} {given.direction} direction(s){groups}",
        f"coordinates, gradients and directions: float32; low_rank has rank {given.rank}; optimizer {given.optimizer} "
        "(full: seeded SGD, which has no state)",
        f"attention: {given.attention}; a key-value cache and logits at the last position alone in inference only",
        f"LoRA: rank {given.lora_rank} on {targets}, weights in float32",
        "int8, nf4: bitsandbytes on all linear layers except the head, the rest in "
        f"{given.dtype}; nf4 double: the scales are quantized too",
        "low_rank, folding: with zo_fold_rounding='gptq', whose forward pass before a fold reads 512 tokens; its new codes "
        "wait in the CPU's memory, which then holds a copy of all codes",
        "streamed: every weight is in the CPU's memory or on the disk; two layers and the largest other module are on the "
        "GPU; a fold loads all of it once more, and writes it back",
        f"backward: Trainer in {given.dtype} mixed precision (trained weights, their gradients and AdamW's two moments "
        "in float32), fused AdamW, logits at every position",
        f"overhead in every total: {given.overhead / GB:.1f} GB for the CUDA context, libraries and the allocator, "
        "an assumption",
    ]
    return ["assumed", *(f"  {line}" for line in (*lines, *result.notes))]


def _batched(args: argparse.Namespace) -> bool | str:
    return True if args.in_one_pass else False if args.one_after_another else "auto"


def _labels(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdecimal():
        raise ValueError(f"--labels {word!r} is not a number of positions; give a number, or 'all'.")
    return int(word)


def _rows(word: str) -> int | str:
    if word != "auto" and not word.isdecimal():
        raise ValueError(f"--rows-per-direction {word!r} is not a number of rows; give a number, or 'auto'.")
    return word if word == "auto" else int(word)


def _overhead(word: str) -> int:
    if word.strip() == "0":
        return 0
    try:
        return parse_size(word)
    except ValueError:
        raise ValueError(f"--overhead {word!r} is not a size; write a number and a unit such as 1GB, or 0.") from None


def _embedded_model() -> str:
    from zo_hf.tasks.assets import AssetError, default_model

    try:
        return str(default_model())
    except AssetError as error:
        raise ValueError(f"MODEL is not given, and the embedded model cannot be fetched: {error}") from None
