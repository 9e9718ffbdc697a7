"""What fits on a GPU: peak memory of every way to fine-tune a model, from its config alone. Nothing is downloaded but
the config, and no weight is ever made.

    zo-hf plan meta-llama/Meta-Llama-3-8B --gpu-memory 24GB
    zo-hf plan path/to/config.json --gpu-memory 16GiB --batch-size 4 --sequence-length 1024
    zo-hf plan                                       the embedded default model

MODEL is a folder with config.json, such a file itself, or a name on the hub. A row is a way to train, and a base, the
format of the weights underneath:

    llama on 24.0 GB; sizes in GB

    way                   base           moves  weights   state  working    total   fits
    inference             bfloat16           -    16.06    0.00     1.03    18.09   yes    5.91 left
    low_rank              bfloat16        6.8M    16.06    0.17     0.98    18.20   yes    5.80 left
    low_rank              nf4             5.5M     6.03    0.14     0.98     8.14   yes   15.86 left
    full                  bfloat16        8.0B    16.06    0.00     0.98    18.04   yes    5.96 left
    adapter               bfloat16        1.3M    16.07    0.02     0.98    18.08   yes    5.92 left
    adapter               nf4             1.3M     6.04    0.02     0.98     8.04   yes   15.96 left
    adapter               nf4 double      1.3M     5.72    0.02     0.98     7.72   yes   16.28 left

    for comparison, with a backward pass:
    LoRA, checkpointing   bfloat16        3.4M    16.07    0.04     7.43    24.55   no     0.55 missing
    QLoRA, checkpointing  nf4 double      3.4M     5.72    0.04     7.43    14.19   yes    9.81 left
    AdamW, checkpointing  float32         8.0B    32.12   96.36     0.07   129.55   no   105.55 missing

    moves    numbers that are trained: coordinates, adapter weights, or all weights
    weights  the model, quantised if the row says so, with its adapter
    state    what stays from step to step: coordinates, directions, gradients, the optimizer's
    working  what the peak of a step has beyond that: activations, logits, scratch
    total    all of it, with the overhead; "fits" says how much of the GPU is left, or is missing

One step of each way is run on tensors that have a shape and no values, by the code that trains, and the storages alive
at each moment are added up. In float32 on a CPU the peak is that of torch's allocator to within one percent. int8 and
nf4 are taken from how bitsandbytes works, and nothing has been measured on a GPU. GB is 10⁹ bytes and GiB is 2³⁰; a card
sold as 24 GB has about 24 GiB.
"""

from __future__ import annotations

import argparse
import logging
import warnings

from zo_hf.planner.assumptions import ATTENTION, HALF_DTYPES, OPTIMIZER_COPIES, Assumptions
from zo_hf.planner.model import load_config
from zo_hf.planner.plan import Plan, Row, plan
from zo_hf.planner.size import GB, parse_size

DEFAULTS = Assumptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf plan`."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder, config.json or name on the hub; default: the embedded one")
    add("--gpu-memory", default="24GB", metavar="SIZE", help="of the GPU, such as 24GB or 16GiB (%(default)s)")
    add("--batch-size", type=int, default=DEFAULTS.batch_size, help="rows in a batch (%(default)s)")
    add("--sequence-length", type=int, default=DEFAULTS.sequence_length, help="tokens in a row (%(default)s)")
    add("--dtype", default=DEFAULTS.dtype, choices=HALF_DTYPES, help="of the rows in half precision (%(default)s)")
    add(
        "--labels",
        default=str(DEFAULTS.labels),
        help="positions with a label at the end of a row, or all; logits are made only there (%(default)s)",
    )
    add("--no-padding", action="store_true", help="all rows have the same length, so that there is no mask")
    add("--attention", default=DEFAULTS.attention, choices=ATTENTION, help="eager holds the scores (%(default)s)")
    add("--rank", type=int, default=DEFAULTS.rank, help="of low_rank's factors, zo_rank (%(default)s)")
    add(
        "--num-directions",
        type=int,
        default=DEFAULTS.num_directions,
        help="q; a two-point step has 2q probes (%(default)s)",
    )
    add(
        "--one-after-another",
        action="store_true",
        help="probes each in a forward pass of their own, zo_batched_probes=False; default: all in one",
    )
    add("--direction", default=DEFAULTS.direction, choices=("gaussian", "rademacher"), help="(%(default)s)")
    add("--optimizer", default=DEFAULTS.optimizer, choices=OPTIMIZER_COPIES, help="of the coordinates (%(default)s)")
    add("--lora-rank", type=int, default=DEFAULTS.lora_rank, help="of LoRA adapters (%(default)s)")
    add(
        "--lora-targets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules with an adapter, or all-linear; default: what PEFT takes for the model",
    )
    add("--overhead", default="1GB", metavar="SIZE", help="of the CUDA context, libraries, allocator (%(default)s)")


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
        batched=not args.one_after_another,
        direction=args.direction,
        optimizer=args.optimizer,
        lora_rank=args.lora_rank,
        lora_targets=tuple(args.lora_targets),
        overhead=_overhead(args.overhead),
    )
    gpu_memory = parse_size(args.gpu_memory)
    config = load_config(args.model if args.model is not None else _embedded_model())
    # A step that is only traced warns of kernels that are not installed here, and the like.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(text(plan(config, gpu_memory, given)))


def text(result: Plan) -> str:
    """The plan as it is printed: the table, then every assumption."""
    head = f"{'way':<22}{'base':<12}{'moves':>8}{'weights':>9}{'state':>8}{'working':>9}{'total':>9}   fits"
    lines = [f"{result.model} on {result.gpu_memory / GB:.1f} GB; sizes in GB", "", head]
    group = None
    for row in result.rows:
        if row.way.needs_backward and group != "backward":
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
    return f"{_title(row):<22}{row.base:<12}{_count(row.moves):>8}{sizes}   {headroom}"


def _title(row: Row) -> str:
    return f"{row.way.kind}, checkpointing" if row.way.checkpointing else row.way.kind


def _count(number: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}"
    return str(number) if number else "-"


def _assumptions(result: Plan) -> list[str]:
    given = result.assumptions
    labels = "every position" if given.labels is None else f"the last {given.labels} position(s)"
    probes = (
        f"all {given.probes} probes in one forward pass, which holds {given.probes} times the activations"
        if given.batched
        else f"{given.probes} probes, one after another"
    )
    targets = ", ".join(given.lora_targets) or "PEFT's choice"
    said = [
        f"batch: {given.batch_size} rows of {given.sequence_length} tokens, "
        + ("padded, so with a mask" if given.padded else "all of one length, so without a mask"),
        f"labels: at {labels}; a zeroth-order step makes logits only there (everywhere if that is more than half)",
        f"a step: {probes}; {given.num_directions} {given.direction} direction(s)",
        f"coordinates, gradients and directions: float32; low_rank has rank {given.rank}; optimizer {given.optimizer} "
        "(full: seeded SGD, which keeps nothing)",
        f"attention: {given.attention}; no key-value cache but in inference, whose logits are the last position's",
        f"LoRA: rank {given.lora_rank} on {targets}, weights in float32",
        "int8, nf4: bitsandbytes on all linear layers but the head, the rest in "
        f"{given.dtype}; nf4 double: its scales quantised too",
        f"backward: Trainer in {given.dtype} mixed precision (weights that move, their gradients and AdamW's two moments "
        "in float32), fused AdamW, logits at every position",
        f"overhead in every total: {given.overhead / GB:.1f} GB for the CUDA context, libraries and the allocator, "
        "an assumption",
    ]
    return ["assumed", *(f"  {line}" for line in (*said, *result.notes))]


def _labels(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdecimal():
        raise ValueError(f"--labels {word!r} is not a number of positions; give one, or 'all'.")
    return int(word)


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
        raise ValueError(f"MODEL is not given and the embedded one cannot be fetched: {error}") from None
