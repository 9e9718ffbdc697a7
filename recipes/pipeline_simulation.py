"""Simulate a pipeline of up to 64 stages: the share of a step in which stages wait, and the links that they wait for.

    python recipes/pipeline_simulation.py
    python recipes/pipeline_simulation.py --link-bytes 1.25e8 --output docs/figures/pipeline.json

Nothing is trained and nothing is sent. A step has M micro-batches. The one-way pipeline sends two probes of each through the
stages, and the losses of the last stage come back once, at the end. Its rival makes one forward pass of each and then one
backward pass, which takes twice as long and goes the other way (GPipe, arXiv 1811.06965). A stage starts with a pass when its
activations have arrived and the pass before has ended. A link carries one message at a time, while both of its stages compute.

The time of a pass over all layers is `--pass-seconds`, divided equally among the stages, and each stage's time varies by
`--jitter`. The defaults are a model of 70 billion parameters (80 layers of width 8192), micro-batches of 2048 tokens, and
links of 10 Gbit/s.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common.simulations import check_output, plotted, simulation_parser, write_results

from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

STAGES = (2, 4, 8, 16, 32, 64)
#: Time of a backward pass, in forward passes.
BACKWARD = 2.0


def arguments() -> argparse.Namespace:
    parser = simulation_parser(__doc__)
    add = parser.add_argument
    add(
        "--micro-batches",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="numbers of micro-batches of a step, to be simulated in turn (%(default)s)",
    )
    add("--steps", type=int, default=50, help="steps to simulate (%(default)s)")
    add("--pass-seconds", type=float, default=0.7, help="time of a forward pass of a micro-batch (%(default)s)")
    add("--jitter", type=float, default=0.05, help="log standard deviation of a stage's time for a pass (%(default)s)")
    add("--tokens", type=int, default=2048, help="tokens of a micro-batch (%(default)s)")
    add("--width", type=int, default=8192, help="numbers of an activation, of two bytes each (%(default)s)")
    add("--link-bytes", type=float, default=1.25e9, help="bytes per second between two stages (%(default)s)")
    add("--latency", type=float, default=1e-4, help="latency of a message in seconds (%(default)s)")
    add("--update-seconds", type=float, default=0.01, help="time of the update at the end of a step (%(default)s)")
    return parser.parse_args()


def stream(starts: np.ndarray, times: np.ndarray, transfer: float, latency: float) -> np.ndarray:
    """Return when each stage has ended each pass of a stream, (stages, passes).

    Args:
        starts: when each stage is free, (stages,).
        times: seconds of each pass in each stage, (stages, passes), in the order of the stream.
        transfer: seconds in which a link carries the activations of a pass.
        latency: seconds until a message arrives, beyond that.
    """
    stages, passes = times.shape
    ends = np.zeros((stages, passes))
    arrived = np.zeros(passes)
    for stage in range(stages):
        free, link = starts[stage], 0.0
        leaves = np.zeros(passes)
        for number in range(passes):
            free = max(free, arrived[number]) + times[stage, number]
            ends[stage, number] = free
            link = max(link, free) + transfer
            leaves[number] = link + latency
        arrived = leaves
    return ends


def simulate(args: argparse.Namespace, stages: int, micro_batches: int, backward: bool) -> dict[str, float]:
    """Return the mean seconds of a step, and the share of them in which a stage waits."""
    random = np.random.default_rng(args.seed)
    transfer = 2 * args.tokens * args.width / args.link_bytes
    passes = micro_batches if backward else 2 * micro_batches
    clock, busy = 0.0, 0.0
    for _ in range(args.steps):
        times = args.pass_seconds / stages * np.exp(args.jitter * random.standard_normal((stages, passes)))
        ends = stream(np.full(stages, clock), times, transfer, args.latency)
        busy += times.sum()
        if backward:
            times = BACKWARD * args.pass_seconds / stages
            times *= np.exp(args.jitter * random.standard_normal((stages, passes)))
            # The last stage begins with the backward passes, and each stage is free after its forward passes.
            ends = stream(ends[::-1, -1], times, transfer, args.latency)
            busy += times.sum()
        clock = ends.max() + args.latency + args.update_seconds
        busy += stages * args.update_seconds
    return {
        "stages": stages,
        "micro_batches": micro_batches,
        "backward": float(backward),
        "seconds": clock / args.steps,
        "waiting": 1 - busy / (stages * clock),
        "formula": (stages - 1) / (passes + stages - 1),
        "transfer_share": transfer / (args.pass_seconds / stages),
    }


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        f"{'stages':>6} {'micro-batches':>13} {'one way s':>10} {'waiting':>8} {'formula':>8} {'backward s':>11} "
        f"{'waiting':>8} {'formula':>8} {'transfer / pass':>16}"
    ]
    for one_way, both in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"{one_way['stages']:>6} {one_way['micro_batches']:>13} {one_way['seconds']:>10.2f} {one_way['waiting']:>8.1%} "
            f"{one_way['formula']:>8.1%} {both['seconds']:>11.2f} {both['waiting']:>8.1%} {both['formula']:>8.1%} "
            f"{one_way['transfer_share']:>16.2f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    with plotted(path, (7, 3.5)) as axis:
        for index, micro_batches in enumerate(sorted({row["micro_batches"] for row in rows})):
            for backward, style, kind in ((0.0, "o-", "one way"), (1.0, "s--", "with a backward")):
                own = [row for row in rows if row["micro_batches"] == micro_batches and row["backward"] == backward]
                axis.plot(
                    [row["stages"] for row in own],
                    [100 * row["waiting"] for row in own],
                    style,
                    color=f"C{index}",
                    label=f"{micro_batches:.0f} micro-batches, {kind}",
                )
        axis.set(xlabel="stages", ylabel="waiting, % of a step", xscale="log", ylim=(0, 100))
        axis.set_xticks(STAGES, [str(stages) for stages in STAGES])
        axis.minorticks_off()
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)


def main() -> None:
    args = arguments()
    check_output(args.output)
    rows = [
        simulate(args, stages, micro_batches, backward)
        for micro_batches in args.micro_batches
        for stages in STAGES
        for backward in (False, True)
    ]
    print(table(rows))
    if args.output is not None:
        write_results(args, rows)
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
