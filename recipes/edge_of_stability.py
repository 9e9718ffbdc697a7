# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[plot]", "scikit-learn>=1.4"]
# ///
"""Train small networks at the edge of stability, and compare them with the bounds of arXiv 2604.14669.

    python recipes/edge_of_stability.py                                # every question; seven minutes of a free core
    python recipes/edge_of_stability.py --networks cnn --methods gd adam --steps 5000
    python recipes/edge_of_stability.py --plot-only --figures docs/figures

The setting is the full batch, the squared loss ½|f - y|², and two-point estimates along one Gaussian direction. The
networks have only some hundreds of weights. So automatic differentiation gives the whole Hessian: its trace, its
largest eigenvalue, and η* itself.

    gd, gdm    Tr(H) and 2(1 - β)/η        adam    Tr(P⁻¹H) and 2/η, P of the optimizer's state

The step size of a run is η* of the initial network, divided by a margin. For adam, η* is computed with P = |∇L|,
because the noise makes √v̂ approximately that. The results are runs.jsonl in OUTPUT, from which an interrupted
comparison continues, and stability-networks.png, stability-catapult.png and stability-eps.png in FIGURES.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.finished import add_report_options, finished_runs, report_runs
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from zo_hf import ZerothOrder
from zo_hf.comparison.finished_runs import finished_runs_are_kept
from zo_hf.stability import critical_step_size, critical_step_size_of_hessian, step_size_bounds
from zo_hf.subspaces import FullInMemory
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command

SETTINGS = ("network", "method", "margin", "eps", "raised", "seed", "steps")
METHODS: dict[str, dict[str, Any]] = {
    "gd": {"momentum": 0.0, "ema": False},
    "gdm-0.5": {"momentum": 0.5, "ema": False},
    "gdm-0.9": {"momentum": 0.9, "ema": False},
    "adam": {"momentum": 0.9, "ema": True},
}
BETA_2 = 0.999
POINTS = 16
EXAMPLES = 32
DIVERGED = 1e3  # a run has diverged when its loss is this many times the initial loss


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["cnn", "vit", "lstm"], help="networks (%(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods (all)")
    add("--steps", type=int, default=8000, help="steps of a run (%(default)s)")
    add(
        "--margins",
        type=float,
        nargs="+",
        help="η*/η at the start: the first for all methods, others for gd (the network's own margins)",
    )
    add("--eps", type=float, default=1e-3, help="distance of a probe (%(default)s: the paper's)")
    add(
        "--other-eps",
        type=float,
        nargs="*",
        default=[1e-4, 1e-2, 1e-1],
        help="other distances, for gd with the first network and margin (%(default)s)",
    )
    add(
        "--raises",
        type=float,
        nargs="*",
        default=[1.5, 2.0],
        help="factors on η half-way, for gd with the first network and the largest margin (%(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of weights and directions (%(default)s)")
    add_report_options(parser, Path("out/edge_of_stability"))
    return parser.parse_args(words)


class Attention(nn.Module):
    """One pre-norm block of a transformer, (rows, tokens, width) -> (rows, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inputs, self.output = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.inputs(self.norm(x)).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.output((weights @ v).transpose(1, 2).reshape(rows, tokens, width))
        return x + self.mlp(x)


class Patches(nn.Module):
    """Four patches of 4 x 4 pixels with their one-hot positions, (rows, 64) -> (rows, 4, 20)."""

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 4, 16)
        places = torch.eye(4, dtype=x.dtype).expand(len(x), 4, 4)
        return torch.cat([patches, places], dim=-1)


class MeanOfTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class LSTM(nn.Module):
    """The last state of an LSTM, (rows, time) -> (rows, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gates = width, nn.Linear(1 + width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        state = cell = torch.zeros(len(x), self.width, dtype=x.dtype)
        for value in x.unbind(1):
            input_, forget, new, output = self.gates(torch.cat([value[:, None], state], dim=1)).chunk(4, dim=1)
            cell = forget.sigmoid() * cell + input_.sigmoid() * new.tanh()
            state = output.sigmoid() * cell.tanh()
        return state


def cnn(activation: type[nn.Module] = nn.GELU, normalize: bool = True) -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for channels in ((1, 4), (4, 8)):
        layers.append(nn.Conv2d(*channels, 3, stride=2, padding=1))
        layers += [nn.GroupNorm(1, channels[1], affine=False)] if normalize else []
        layers.append(activation())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))


def plain_cnn() -> nn.Module:
    return cnn(nn.Tanh, normalize=False)


def vit() -> nn.Module:
    return nn.Sequential(Patches(), nn.Linear(20, 8), Attention(8, 2), MeanOfTokens(), nn.Linear(8, 10))


def lstm() -> nn.Module:
    return nn.Sequential(LSTM(10), nn.Linear(10, 5))


def digits() -> tuple[Tensor, Tensor]:
    """Return standardized pictures of 8 x 8 pixels, (rows, 64), and one-hot classes, (rows, 10)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = torch.tensor(data.data[:EXAMPLES], dtype=torch.float32)
    # Without this, the mean picture would be one direction with a curvature far above that of all others.
    pictures = (pictures - pictures.mean(0)) / (pictures.std(0) + 1)
    return pictures, torch.eye(10)[torch.tensor(data.target[:EXAMPLES])]


def sorting() -> tuple[Tensor, Tensor]:
    """Return rows of five numbers between -1 and 1, (rows, 5), and the same numbers in ascending order."""
    numbers = 2 * torch.rand(EXAMPLES, 5, generator=torch.Generator().manual_seed(0)) - 1
    return numbers, numbers.sort(dim=1).values


@dataclass(frozen=True)
class Network:
    """A network with its data, and the margins of its runs: the first for all methods, the others for gd alone."""

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    margins: tuple[float, ...]


NETWORKS = {
    "cnn": Network(cnn, digits, (1.0, 1.3)),
    "vit": Network(vit, digits, (1.5, 1.2)),
    "lstm": Network(lstm, sorting, (1.4, 2.0)),
    "plain-cnn": Network(plain_cnn, digits, (1.6,)),
}


class SquaredLoss:
    """½|f - y|², averaged over examples, for one probe or for several in one forward pass."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets, self.rows = model, inputs, targets, len(inputs)

    def __call__(self) -> Tensor:
        return self.of(dict(self.model.named_parameters()))

    def batched(self, copies: int) -> Tensor:
        """Return the losses of `copies` probes, (copies,), from one forward pass."""
        outputs = self.model(self.inputs.repeat(copies, 1)).view(copies, self.rows, -1)
        return 0.5 * (outputs - self.targets).square().sum(-1).mean(1)

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        outputs = functional_call(self.model, dict(parameters), (self.inputs,))
        return 0.5 * (outputs - self.targets).square().sum(-1).mean()


def hessian(loss: SquaredLoss) -> tuple[float, Tensor, Tensor]:
    """Return the loss, the gradient (d,) and the Hessian (d, d) at the model's parameters, in their order."""
    parameters = {name: p.detach() for name, p in loss.model.named_parameters()}
    point = torch.cat([p.flatten() for p in parameters.values()])

    def at(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in parameters.values()])
        return loss.of({name: v.view_as(p) for (name, p), v in zip(parameters.items(), parts, strict=True)})

    gradient = grad(at)
    matrix = vmap(lambda v: jvp(gradient, (point,), (v,))[1], chunk_size=128)(torch.eye(len(point), dtype=point.dtype))
    return float(at(point)), gradient(point), 0.5 * (matrix + matrix.T)


def preconditioner(optimizer: torch.optim.Optimizer, step: int) -> Tensor | None:
    """Return P of x ← x - η·P⁻¹·m, (d,), in the parameters' order; None if the optimizer has none."""
    if not isinstance(optimizer, torch.optim.Adam):
        return None
    group = optimizer.param_groups[0]
    beta_1, beta_2 = group["betas"]
    squares = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in group["params"]])
    return (1 - beta_1**step) * ((squares / (1 - beta_2**step)).sqrt() + group["eps"])


def measure(loss: SquaredLoss, optimizer: torch.optim.Optimizer, method: str, step: int) -> dict[str, float]:
    """Measure loss, trace, largest eigenvalue and η* after a step; of H, or of P⁻¹H for adam."""
    value, _, matrix = hessian(loss)
    scale = preconditioner(optimizer, step)
    if not torch.isfinite(matrix).all():
        return {"step": step, "loss": math.inf}
    similar = matrix if scale is None else matrix * (scale[:, None] * scale) ** -0.5
    values = torch.linalg.eigvalsh(similar.double())
    eta = optimizer.param_groups[0]["lr"]
    critical = critical_step_size_of_hessian(matrix, scale, **METHODS[method], negative="ignore")
    point = {"step": step, "loss": value, "step_size": eta, "critical": critical}
    point |= {"trace": float(values.sum()), "largest": float(values[-1]), "negative": float(values.clamp(max=0).sum())}
    if scale is not None:  # the distance of P from a multiple of I, and its effect on η*
        commuting = critical_step_size(values, **METHODS[method], negative="ignore")
        point |= {"spread": float(scale.log().std()), "critical_if_commuting": commuting}
    return point


def train(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make one run, and measure the trace, the largest eigenvalue and η* during it."""
    torch.set_num_threads(1)
    seed = settings["seed"]
    torch.manual_seed(seed)
    network = NETWORKS[settings["network"]]
    model, method = network.make(), METHODS[settings["method"]]
    loss = SquaredLoss(model, *network.data())
    zo = ZerothOrder(model, FullInMemory(model, seed=seed), eps=settings["eps"], seed=seed, batched_probes=True)
    parameters = list(zo.subspace.coordinates.values())
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    start, gradient, matrix = hessian(loss)
    rate = critical_step_size_of_hessian(matrix, **method, negative="ignore") / settings["margin"]
    optimizer: torch.optim.Optimizer
    if method["ema"]:
        rate *= float(gradient.norm())
        optimizer = torch.optim.Adam(parameters, lr=rate, betas=(method["momentum"], BETA_2))
    else:
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=method["momentum"])
    zo.prepare(optimizer)
    steps, started = settings["steps"], time.process_time()
    measured_steps = {max(1, round(steps * i / POINTS)) for i in range(POINTS + 1)}
    curve, losses = [], []
    for step in range(1, steps + 1):
        if settings["raised"] != 1 and step == steps // 2 + 1:
            optimizer.param_groups[0]["lr"] *= settings["raised"]
        losses.append(zo.estimate(loss).loss)
        optimizer.step()
        if step in measured_steps:
            curve.append(measure(loss, optimizer, settings["method"], step))
        if not losses[-1] < DIVERGED * start:
            break
    every = max(1, steps // 500)
    result = {"parameters": sum(p.numel() for p in parameters), "initial_trace": float(matrix.trace())}
    result |= {"curve": curve, "losses": losses[::every], "every": every, "diverged": len(losses) < steps}
    zo.finish()
    return dict(settings) | result | {"seconds": time.process_time() - started}


def margins_of(args: argparse.Namespace, network: str) -> tuple[float, ...]:
    return tuple(args.margins or NETWORKS[network].margins)


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the settings of the requested runs: every method, then a raised step size, then other distances."""
    shared = {"eps": args.eps, "raised": 1.0, "seed": args.seed, "steps": args.steps}
    for network in args.networks:
        margins = margins_of(args, network)
        for method in args.methods:
            for margin in margins if method == "gd" else margins[:1]:
                yield shared | {"network": network, "method": method, "margin": margin}
    margins = margins_of(args, args.networks[0])
    plain = shared | {"network": args.networks[0], "method": "gd"}
    for raised in args.raises:
        yield plain | {"margin": max(margins), "raised": raised}
    for eps in args.other_eps:
        yield plain | {"margin": margins[0], "eps": eps}


def threshold(run: Mapping[str, Any], step_size: float) -> float:
    """Return the trace whose upper bound on η* is this step size."""
    method = METHODS[run["method"]]
    return 2 * (1.0 if method["ema"] else 1 - method["momentum"]) / step_size


def draw_edge(axes: Any, run: Mapping[str, Any], color: str) -> None:
    """Draw the band from Tr to Tr + 2λmax/(1+β), and the thresholds of η* (dotted) and of the step size (dashed)."""
    method = METHODS[run["method"]]
    points = [point for point in run["curve"] if math.isfinite(point["loss"])]
    steps, traces = [p["step"] for p in points], [p["trace"] for p in points]
    bounds = [step_size_bounds(p["trace"], p["largest"], **method) for p in points]
    axes.fill_between(
        steps, traces, [threshold(run, lower) for lower, _ in bounds], color=color, alpha=0.3, linewidth=0
    )
    axes.plot(steps, traces, color=color, linewidth=1)
    axes.plot(steps, [threshold(run, p["critical"]) for p in points], ":", color=color, linewidth=1)
    axes.plot(steps, [threshold(run, p["step_size"]) for p in points], "--", color=color, drawstyle="steps-pre")


def draw_losses(axes: Any, run: Mapping[str, Any], color: str, label: str) -> None:
    steps = [run["every"] * i + 1 for i in range(len(run["losses"]))]
    axes.plot(steps, run["losses"], color=color, linewidth=0.8, label=label)


def plot(args: argparse.Namespace, finished: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Draw a figure in `folder` for each question with finished runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = [run for run in finished if run["raised"] == 1 and run["eps"] == args.eps]
    if grid:
        rows, columns = len(args.networks), len(args.methods)
        figure, panels = pyplot.subplots(
            rows, columns, figsize=(3.2 * columns, 2.4 * rows), sharex=True, squeeze=False
        )
        for run in grid:
            axes = panels[args.networks.index(run["network"])][args.methods.index(run["method"])]
            draw_edge(axes, run, f"C{margins_of(args, run['network']).index(run['margin'])}")
            axes.set_title(f"{run['network']}, {run['method']}", fontsize="small")
            start = run["curve"][0]["step_size"]
            axes.set_ylim(0, max(axes.get_ylim()[1] if len(axes.lines) > 3 else 0, 1.5 * threshold(run, start)))
        for axes in panels[-1]:
            axes.set_xlabel("step")
        panels[0][0].set_ylabel("Tr, and (dashed) its threshold")
        figure.tight_layout()
        figure.savefig(folder / "stability-networks.png", dpi=110)
    for name, key in (("catapult", "raised"), ("eps", "eps")):
        other = "eps" if key == "raised" else "raised"
        margins = margins_of(args, args.networks[0])
        margin = max(margins) if key == "raised" else margins[0]
        chosen = [
            run
            for run in finished
            if (run["network"], run["method"], run["margin"]) == (args.networks[0], "gd", margin)
            and run[other] == {"eps": args.eps, "raised": 1.0}[other]
        ]
        if not chosen:
            continue
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2))
        for index, run in enumerate(sorted(chosen, key=lambda run: run[key])):
            label = f"η × {run['raised']:g}" if key == "raised" else f"ε = {run['eps']:g}"
            draw_losses(left, run, f"C{index}", label)
            draw_edge(right, run, f"C{index}")
        left.set(yscale="log", xlabel="step", ylabel="loss", ylim=(None, 10))
        right.set(xlabel="step", ylabel="Tr, and (dashed) its threshold", ylim=(0, None))
        left.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / f"stability-{name}.png", dpi=110)


def table(args: argparse.Namespace, finished: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the runs' ends in units of their threshold, so that 1 is the edge of stability."""
    lines = [
        "| network | method | margin | ε | η raised | loss | Tr | Tr + 2λmax/(1+β) | η/η* | largest η/η* | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for run in finished:
        method = METHODS[run["method"]]
        points = [p for p in run["curve"] if math.isfinite(p["loss"])]
        last = points[-1]
        lower, upper = step_size_bounds(last["trace"], last["largest"], **method)
        eta = last["step_size"]
        peak = max(p["step_size"] / p["critical"] for p in points if p["step"] > args.steps // 10 or p is last)
        cells = [run["network"], run["method"], *(f"{run[key]:g}" for key in ("margin", "eps", "raised"))]
        cells += [f"{last['loss']:.3g}", f"{eta / upper:.2f}", f"{eta / lower:.2f}", f"{eta / last['critical']:.2f}"]
        cells += [f"{peak:.2f}", f"diverges at {len(run['losses']) * run['every']}" if run["diverged"] else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    finished = finished_runs(args, SETTINGS, runs(args), train)
    report_runs(args, finished, functools.partial(table, args), functools.partial(plot, args))


if __name__ == "__main__":
    with command(finished_runs_are_kept), refusals_end_the_command():
        main()
