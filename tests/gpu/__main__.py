"""Print how often steps of large models launch a kernel and wait: `python -m tests.gpu`. It takes some minutes.

Launches of a whole model are extrapolated from one and two layers, see `count`. Rows with Triton's kernels need Triton.
"""

from __future__ import annotations

from tests.gpu.count import Case
from zo_hf.kernels.choice import is_installed

CASES = {
    "`low_rank`, with Triton": [
        Case(model, {}, folds=True, kernels=True) for model in ("OPT-125M", "OPT-1.3B", "Llama-8B")
    ],
    "`low_rank`": [Case("OPT-125M", {}, folds=True), Case("OPT-1.3B", {}), Case("Llama-8B", {})],
    "`low_rank`, 8 directions": [Case("OPT-125M", {"num_directions": 8})],
    "`low_rank`, a direction for every row": [Case("OPT-125M", {}, rows=True)],
    "LoRA of rank 8": [Case("OPT-125M", {"subspace": "adapter"}, lora=8)],
}
COLUMNS = "bare forward | step | × forward | evaluation | fold | checkpoint | reads, uploads of a step"

if __name__ == "__main__":
    print(f"| | model | {COLUMNS} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---|")
    for name, cases in CASES.items():
        for case in cases:
            if case.kernels and not is_installed():
                continue
            found = case.at_depth()
            (forward, *_), (step, reads, uploads) = found["forward"], found["step"]
            fold, checkpoint = (f"{found[part][0]:,}" if part in found else "" for part in ("fold", "state dict"))
            parts = f"{step / forward:.2f} | {found['evaluation'][0]:,} | {fold} | {checkpoint} | {reads}, {uploads}"
            print(f"| {name} | {case.model} | {forward:,} | {step:,} | {parts} |", flush=True)
