"""Print how often steps of large models launch a kernel and wait: `python -m tests.gpu`. It takes some minutes.

Launches of a whole model are extrapolated from one and two layers, see `count`.
"""

from __future__ import annotations

from tests.gpu.count import Case

CASES = {
    "`low_rank`": [Case("OPT-125M", {}, folds=True), Case("OPT-1.3B", {}), Case("Llama-8B", {})],
    "`low_rank`, 8 directions": [Case("OPT-125M", {"num_directions": 8})],
    "`low_rank`, a direction for every row": [Case("OPT-125M", {}, rows=True)],
    "LoRA of rank 8": [Case("OPT-125M", {"subspace": "adapter"}, lora=8)],
}

if __name__ == "__main__":
    print("| | model | bare forward | step | × forward | evaluation | fold | reads, uploads of a step |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for name, cases in CASES.items():
        for case in cases:
            found = case.at_depth()
            (forward, *_), (step, reads, uploads) = found["forward"], found["step"]
            fold = f"{found['fold'][0]:,}" if "fold" in found else ""
            parts = f"{step / forward:.2f} | {found['evaluation'][0]:,} | {fold} | {reads}, {uploads}"
            print(f"| {name} | {case.model} | {forward:,} | {step:,} | {parts} |", flush=True)
