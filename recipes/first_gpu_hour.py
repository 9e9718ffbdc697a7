# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft,quantization,test]"]
# ///
"""Run on a GPU what needs one: tests, kernel counts, benchmarks and the demo. It writes one JSON file and one table.

    python3 run.py gpu                          on the GPU, for at most eight minutes (--minutes)
    python3 run.py gpu --device cpu --small     the same parts, each as small as it goes, without a GPU

Every part is a process of its own with a time limit. A part that fails, or for which no time is left, is reported, and the
others go on. The command's exit code is 1 if a part failed.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zo_hf.cli import bench, bench_steps
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.refusals import refusals_end_the_command
from zo_hf.trainer.output_paths import check_file

ROOT = Path(__file__).resolve().parents[1]
#: A part does not begin with less time than this.
LEAST_SECONDS = 10
#: How much longer parts may take on a CPU, which nobody pays by the minute, and whose cores others may keep busy.
MORE_ON_CPU = 5
#: Variants of `zo-hf bench` that are measured for every shape, and those that draw too much noise for the large ones.
VARIANTS = ("low_rank", "low_rank-rows-rademacher", "adapter")
DENSE = ("full-rademacher", "textbook-mezo")
#: Those with CUDA graphs, and the same without.
GRAPHS = ("low_rank", "low_rank-graph", "low_rank-rows-rademacher", "low_rank-rows-graph")


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        name: the part's name in the report.
        arguments: what Python gets, with {output} for the file of its results.
        limit: seconds after which it is stopped.
        environment: variables for it alone.
    """

    name: str
    arguments: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)


def parts(device: str, small: bool) -> list[Part]:
    """Return what a run consists of, the most important first."""
    files = ("tests/device",) if small else ("tests/device", "tests/rng", "tests/methods/test_engine.py")
    made = [
        _tests("tests", device, files, 2 if small else 8, 120, "-m", ""),
        *([] if small else [_tests("kernels", device, ("tests/kernels",), 8, 60)]),
        Part("launches", (__file__, "--device", device, "--count-launches", "{output}", *["--small"] * small), 60),
    ]
    if small:
        made.append(_bench("bench tiny", device, "tiny", (*VARIANTS, *DENSE), ("--rounds", "1")))
    else:
        made += [
            _bench("bench opt-1.3b", device, "opt-1.3b", (*VARIANTS, *DENSE)),
            _bench("bench llama-8b", device, "llama-8b", (*VARIANTS, "textbook-mezo"), ("--rounds", "3")),
            _bench("bench opt-125m", device, "opt-125m", (*VARIANTS, *DENSE)),
            _bench("bench opt-125m graph", device, "opt-125m", GRAPHS),
            _bench("bench opt-1.3b int8", device, "opt-1.3b", (), ("--quantization", "int8")),
            _bench("bench opt-1.3b nf4", device, "opt-1.3b", (), ("--quantization", "nf4")),
            _bench("bench opt-13b", device, "opt-13b", VARIANTS[:2], ("--rounds", "3")),
        ]
    recipes = ROOT / "recipes"
    demo = (
        str(recipes / "opt_sst2.py"),
        "--offline",
        "--config",
        str(recipes / "last_norm.yaml"),
        "--output_dir",
        "{output}",
    )
    few = ("--max_steps", "2", "--num_train_examples", "32", "--num_eval_examples", "16")
    on_cpu = ("--use_cpu", "true") if device == "cpu" else ()
    made.append(Part("demo", (*demo, *on_cpu, *(few if small else ())), 240))
    return made if device != "cpu" else [replace(part, limit=MORE_ON_CPU * part.limit) for part in made]


def _tests(name: str, device: str, files: Sequence[str], processes: int, limit: float, *more: str) -> Part:
    """Return a part that runs tests on a device."""
    spread = ("--dist", "loadfile", "-n", str(processes))
    command = ("-m", "pytest", "-q", "-p", "no:warnings", *more, *spread, *files)
    return Part(name, command, limit, {"ZO_HF_TEST_DEVICE": device})


def _bench(name: str, device: str, shape: str, variants: Sequence[str], more: Sequence[str] = ()) -> Part:
    """Return a part that runs `zo-hf bench`."""
    chosen = ("--variants", *variants) if variants else ()
    arguments = (*_setup(device, shape), *more, *chosen)
    return Part(name, ("-m", "zo_hf.cli.main", "bench", *arguments, "--output", "{output}"), 90)


def _setup(device: str, shape: str) -> tuple[str, ...]:
    """Return the options of `zo-hf bench` for a shape on a device."""
    size = ("--rows", "16", "--length", "64") if shape != "tiny" else ("--rows", "2", "--length", "8")
    return ("--shape", shape, "--dtype", "float32" if device == "cpu" else "bfloat16", "--device", device, *size)


def run_part(part: Part, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part and return its results: `status`, `seconds`, `results` and the `end` of what it printed."""
    output = folder / f"{part.name.replace(' ', '-')}.json"
    began = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | part.environment
    words = [sys.executable, *(word.format(output=output) if word == "{output}" else word for word in part.arguments)]
    limit = min(part.limit, seconds)
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as texts:
        # A group of its own, because workers that outlive a stopped part would share the GPU with the next one.
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=texts, stderr=errors, start_new_session=True
        )
        try:
            status = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed = b""
        for file in (errors, texts):
            file.seek(0)
            printed += file.read()
    results = None
    found = output / "metrics.json" if output.is_dir() else output
    if found.is_file():
        with suppress(ValueError):  # a part that was stopped may leave half a file
            results = json.loads(found.read_text(encoding="utf-8"))
    end = [line for line in printed.decode(errors="replace").splitlines() if line.strip()][-15:]
    return {"status": status, "seconds": time.perf_counter() - began, "results": results, "end": end}


def count_launches(device: str, small: bool) -> dict[str, dict[str, int]]:
    """Return the kernels that the bench's forward pass and steps launch; on a CPU, the operators that they call."""
    parser = CommandParser()
    bench.add_arguments(parser)
    args = parser.parse_args(_setup(device, "tiny" if small else "opt-125m"))
    model, batch = bench_steps.build(args)
    variants = {"forward": "forward", "step": "low_rank", "step by rows": "low_rank-rows-rademacher"}
    counts = {}
    for what, name in variants.items():
        step = bench_steps.VARIANTS[name](model, batch)
        with step.attached():
            counts[what] = _profiled(step, device)
    return counts


def _profiled(run: Any, device: str) -> dict[str, int]:
    """Return the number of kernels, or of operators, and of synchronizations in one call, after two that warm up."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    run()
    run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=activities) as profiler:
        run()
        if device != "cpu":
            torch.cuda.synchronize()
    events = profiler.events() or []
    on_device = [event for event in events if event.device_type is not DeviceType.CPU]
    calls = Counter(event.name for event in events if event.device_type is DeviceType.CPU)
    kernels = on_device if device != "cpu" else [event for event in events if event.name.startswith("aten::")]
    waits = sum(calls[name] for name in ("cudaStreamSynchronize", "aten::_local_scalar_dense"))
    return {"launches": len(kernels), "waits": waits}


def report(run: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"# {run['hardware']}",
        "",
        f"torch {run['torch']}, {run['platform']}",
        "",
        "| part | status | s |",
        "|---|---|---:|",
    ]
    lines += [f"| {name} | {part['status']} | {part['seconds']:.0f} |" for name, part in run["parts"].items()]
    for name, part in run["parts"].items():
        results = part["results"]
        if name == "tests":
            lines += ["", f"Tests: {part['end'][-1] if part['end'] else 'no output'}"]
        elif results is None:
            lines += ["", f"## {name}: {part['status']}", "", "```text", *part["end"], "```"]
        elif name == "launches":
            lines += ["", "## Launches, or operators on a CPU", "", "| | launches | waits |", "|---|---:|---:|"]
            lines += [f"| {what} | {count['launches']} | {count['waits']} |" for what, count in results.items()]
        elif name == "demo":
            lines += ["", "## Demo", "", "| | |", "|---|---:|"]
            lines += [f"| {key} | {value:.3f} |" for key, value in results.items() if isinstance(value, float)]
        else:
            lines += [
                "",
                f"## {name}",
                "",
                "| variant | ms | x forward | noise % | peak MiB | x forward |",
                "|---|---:|---:|---:|---:|---:|",
            ]
            lines += [
                f"| {row['variant']} | {row['milliseconds']:.1f} | {row['times_forward']:.2f} | "
                f"{'-' if row['noise_percent'] is None else round(row['noise_percent'], 1)} | {row['peak_mib']:.0f} | "
                f"{row['peak_over_forward']:.2f} |"
                for row in results["rows"]
            ]
    return "\n".join(lines) + "\n"


def run_all(chosen: Sequence[Part], device: str, seconds: float, output: Path) -> dict[str, Any]:
    """Run the parts in turn, write the report after each, and return the results of all.

    Args:
        chosen: the parts.
        device: cuda or cpu.
        seconds: the time for all of them.
        output: the JSON file; the table lies beside it.
    """
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    done: dict[str, Any] = {}
    run = {"hardware": hardware, "torch": torch.__version__, "platform": platform.platform(), "parts": done}
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as folder, tqdm(chosen, disable=None) as bar:
        for part in bar:
            bar.set_description(part.name)
            left = end - time.perf_counter()
            skipped = {"status": "no time left", "seconds": 0.0, "results": None, "end": []}
            done[part.name] = run_part(part, Path(folder), left) if left > LEAST_SECONDS else skipped
            output.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
            output.with_suffix(".md").write_text(report(run), encoding="utf-8")
    return run


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="the device (%(default)s)")
    parser.add_argument("--small", action="store_true", help="every part as small as it goes")
    parser.add_argument("--minutes", type=float, help=f"time for all parts (8, and {8 * MORE_ON_CPU} on a CPU)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name (all)")
    parser.add_argument(
        "--output", type=Path, default=Path("out/gpu.json"), help="the results; a .md lies beside them (%(default)s)"
    )
    parser.add_argument(
        "--count-launches", type=Path, metavar="FILE", help="only count kernels, and write them to FILE"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda is not available; use --device cpu --small.")
    if args.count_launches is not None:
        args.count_launches.write_text(json.dumps(count_launches(args.device, args.small)), encoding="utf-8")
        return
    every = {part.name: part for part in parts(args.device, args.small)}
    unknown = [name for name in args.only or () if name not in every]
    if unknown:
        raise ValueError(f"--only {unknown[0]!r} is no part; choose among {', '.join(every)}.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for path in (args.output, args.output.with_suffix(".md")):
        check_file("--output", path)
    minutes = args.minutes or 8 * (MORE_ON_CPU if args.device == "cpu" else 1)
    run = run_all([every[name] for name in args.only or every], args.device, 60 * minutes, args.output)
    print(report(run))
    print(f"written    {args.output} and {args.output.with_suffix('.md')}")
    if any(part["status"] != "passed" for part in run["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
