"""Simulate a run of many loosely coupled workers over the internet: bytes, stragglers, and late joiners.

    python recipes/fleet_simulation.py
    python recipes/fleet_simulation.py --workers 1000 --forward-seconds 0.5 --output docs/figures/fleet.json

Nothing is trained and nothing is sent: times are random, and the bytes of messages are counted. The protocol is that
of a synchronous step. Every worker evaluates its direction with both signs on its rows, and sends two losses to a
coordinator. With `--groups`, it has a direction for every group of its rows, and sends two losses for each. When a
quorum has answered, the coordinator sends the losses of all to every worker, and each worker makes the same update. An
answer after the quorum is dropped. Its worker applies the updates that it missed, and then begins the next step.

A worker's forward time is lognormal: some machines are slower than others (`--machine-spread`), and the speed of each
varies from step to step (`--jitter`). In a small share of its steps a worker stalls for some time (`--stall-share`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common.simulations import check_output, plotted, simulation_parser, write_results

from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

LOSSES_BYTES = 16  # two float64
RECORD_BYTES = 8  # a projected gradient for each direction, in the coordinator's reply
ENVELOPE_BYTES = 100  # TCP/IP headers, TLS record, and acknowledgement of a small message
QUORUMS = (1.0, 0.99, 0.95, 0.9, 0.75)


def arguments() -> argparse.Namespace:
    parser = simulation_parser(__doc__)
    add = parser.add_argument
    add("--workers", type=int, default=1000, help="workers in the fleet (%(default)s)")
    add("--steps", type=int, default=300, help="steps to simulate (%(default)s)")
    add(
        "--directions",
        type=int,
        nargs="+",
        default=[1, 8, 1000],
        help="numbers of directions in a step, to be simulated in turn; every direction has as many workers (%(default)s)",
    )
    add(
        "--groups",
        type=int,
        default=1,
        help="groups of rows on every worker, each with a direction of its own; with more directions than groups, workers "
        "do not have the same ones (%(default)s)",
    )
    add("--forward-seconds", type=float, default=1.0, help="median time of a worker's two probes (%(default)s)")
    add("--draw-seconds", type=float, default=0.005, help="time to draw and add one direction (%(default)s)")
    add("--machine-spread", type=float, default=0.4, help="log standard deviation between machines (%(default)s)")
    add("--jitter", type=float, default=0.15, help="log standard deviation between steps (%(default)s)")
    add("--stall-share", type=float, default=0.002, help="share of steps in which a worker stalls (%(default)s)")
    add("--stall-seconds", type=float, default=60.0, help="mean length of a stall (%(default)s)")
    add("--latency", type=float, default=0.08, help="median one-way latency in seconds (%(default)s)")
    add(
        "--uplink-bytes",
        type=float,
        default=1.25e6,
        help="a worker's bytes per second up; down is ten times (%(default)s)",
    )
    add("--late-by", type=int, default=10_000, help="steps that a late joiner has missed (%(default)s)")
    add(
        "--parameters", type=float, default=13e9, help="weights, for a comparison with data-parallel SGD (%(default)s)"
    )
    return parser.parse_args()


def simulate(args: argparse.Namespace, directions: int, quorum: float) -> dict[str, float]:
    """Return the mean time of a step, the share of the fleet's answers that it uses, and the bytes of its messages."""
    random = np.random.default_rng(args.seed)  # the same times for every quorum
    machines = np.exp(args.machine_spread * random.standard_normal(args.workers))
    needed = max(1, int(np.ceil(quorum * args.workers)))
    answer_bytes = LOSSES_BYTES * args.groups + ENVELOPE_BYTES
    reply = RECORD_BYTES * directions + ENVELOPE_BYTES
    update = args.draw_seconds * directions
    ready = np.zeros(args.workers)  # when each worker begins its probes
    used, clock = 0, 0.0
    for _ in range(args.steps):
        forward = args.forward_seconds * machines * np.exp(args.jitter * random.standard_normal(args.workers))
        stalls = random.random(args.workers) < args.stall_share
        forward += np.where(stalls, random.exponential(args.stall_seconds, args.workers), 0.0)
        latency = args.latency * np.exp(0.5 * random.standard_normal((2, args.workers)))
        answer = ready + forward + latency[0] + answer_bytes / args.uplink_bytes
        complete = np.partition(answer, needed - 1)[needed - 1]
        in_time = answer <= complete
        received = complete + latency[1] + reply / (10 * args.uplink_bytes)
        # A late worker has already received the update, and applies it before the next step.
        ready = np.maximum(received, answer) + update
        used += int(in_time.sum())
        clock = complete
    seconds = clock / args.steps
    return {
        "directions": directions,
        "quorum": quorum,
        "seconds_per_step": seconds,
        "answers_used": used / (args.steps * args.workers),
        "update_seconds": update,
        "bytes_up_per_step": answer_bytes,
        "bytes_down_per_step": reply,
        "coordinator_megabytes_per_step": args.workers * (reply + answer_bytes) / 1e6,
        "late_joiner_megabytes": args.late_by * RECORD_BYTES * directions / 1e6,
        "late_joiner_seconds": catch_up(args.late_by, update, seconds),
    }


def catch_up(missed: int, update_seconds: float, step_seconds: float) -> float:
    """Return the seconds until a late joiner has caught up with the fleet; infinity if its replay is too slow."""
    return missed * update_seconds / (1 - update_seconds / step_seconds) if update_seconds < step_seconds else np.inf


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        f"{'directions':>10} {'quorum':>7} {'s/step':>7} {'answers used':>13} {'up B':>6} {'down B':>7} "
        f"{'coordinator MB/step':>20} {'late joiner':>12}"
    ]
    for row in rows:
        wait = row["late_joiner_seconds"]
        late = "never" if np.isinf(wait) else f"{wait:.0f} s"
        lines.append(
            f"{row['directions']:>10} {row['quorum']:>7.0%} {row['seconds_per_step']:>7.2f} {row['answers_used']:>13.1%} "
            f"{row['bytes_up_per_step']:>6} {row['bytes_down_per_step']:>7} "
            f"{row['coordinator_megabytes_per_step']:>20.2f} {late:>12}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    with plotted(path, (5, 3)) as axis:
        for directions in sorted({row["directions"] for row in rows}):
            own = [row for row in rows if row["directions"] == directions]
            seconds = [row["seconds_per_step"] for row in own]
            axis.plot([row["quorum"] for row in own], seconds, "o-", label=f"{directions:.0f} directions")
        axis.set(xlabel="quorum", ylabel="seconds per step", yscale="log")
        axis.legend()


def main() -> None:
    args = arguments()
    check_output(args.output)
    rows = [simulate(args, directions, quorum) for directions in args.directions for quorum in QUORUMS]
    print(table(rows))
    gradient = 2 * 2 * args.parameters * (args.workers - 1) / args.workers
    hours = gradient / args.uplink_bytes / 3600
    print(
        f"\nData-parallel SGD would send {gradient / 1e9:.0f} GB of bfloat16 gradients per worker and step (ring "
        f"all-reduce): {hours:,.0f} hours on this uplink."
    )
    if args.output is not None:
        write_results(args, rows)
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
