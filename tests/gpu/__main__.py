"""Print how often steps of large models launch a kernel and wait: `python -m tests.gpu`. It takes some minutes.

Launches of a whole model are extrapolated from one and two layers, see `count`. Kernels are counted if Triton is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.gpu.count import Case
from zo_hf.kernels.choice import is_installed

SIGNS = {"subspace": "full", "direction": "rademacher"}
CASES: Mapping[str, Sequence[Case]] = {
    "`low_rank`": [Case("OPT-125M", {}, folds=True), Case("OPT-1.3B", {}), Case("Llama-8B", {})],
    "`low_rank`, 8 directions": [Case("OPT-125M", {"num_directions": 8})],
    "`low_rank`, a direction for every row": [Case("OPT-125M", {}, rows=True)],
    "LoRA of rank 8": [Case("OPT-125M", {"subspace": "adapter"}, lora=8)],
    "`full`, Rademacher": [Case("OPT-125M", SIGNS)],
}
#: The same with the kernels of `zo_kernels`.
WITH_KERNELS: Mapping[str, Sequence[Case]] = {
    "`low_rank`, kernels": [
        Case("OPT-125M", {}, folds=True, kernels=True),
        Case("OPT-1.3B", {}, folds=True, kernels=True),
        Case("Llama-8B", {}, folds=True, kernels=True),
    ],
    "`low_rank`, a direction for every row, kernels": [
        Case("OPT-125M", {}, rows=True, kernels=True),
        Case("Llama-8B", {}, rows=True, kernels=True),
    ],
    "`full`, Gaussian, kernels": [Case("OPT-125M", {"subspace": "full"}, kernels=True)],
    "`full`, Rademacher, kernels": [Case("OPT-125M", SIGNS, kernels=True), Case("Llama-8B", SIGNS, kernels=True)],
}
#: The same with CUDA graphs of the forward pass.
WITH_GRAPHS: Mapping[str, Sequence[Case]] = {
    "`low_rank`, kernels, graph": [
        Case(m, {}, kernels=True, graph=True) for m in ("OPT-125M", "OPT-1.3B", "Llama-8B")
    ],
    "`low_rank`, a direction for every row, kernels, graph": [
        Case("OPT-125M", {}, rows=True, kernels=True, graph=True)
    ],
    "LoRA of rank 8, kernels, graph": [Case("OPT-125M", {"subspace": "adapter"}, lora=8, kernels=True, graph=True)],
}
COLUMNS = "bare forward | step | × forward | evaluation | fold | checkpoint | reads, uploads of a step"

if __name__ == "__main__":
    print(f"| | model | {COLUMNS} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for name, cases in (*CASES.items(), *((WITH_KERNELS | WITH_GRAPHS).items() if is_installed() else ())):
        for case in cases:
            found = case.at_depth()
            (forward, *_), (step, reads, uploads) = found["forward"], found["step"]
            fold, checkpoint = (f"{found[part][0]:,}" if part in found else "" for part in ("fold", "state dict"))
            parts = f"{step / forward:.2f} | {found['evaluation'][0]:,} | {fold} | {checkpoint} | {reads}, {uploads}"
            print(f"| {name} | {case.model} | {forward:,} | {step:,} | {parts} |", flush=True)
