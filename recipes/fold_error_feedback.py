# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,quantization]"]
# ///
"""Fold into 4-bit or 8-bit weights with and without error feedback, and print the losses.

    python recipes/fold_error_feedback.py --model MODEL
    python recipes/fold_error_feedback.py --model MODEL --fold-steps 20 --roundings stochastic --seeds 0

Error feedback adds the rounding error of a fold to what the next one rounds, as QES does (Xu et al., arXiv 2602.03120).
zo_hf has no such option, so this script replaces two methods of a run. Two columns of its table are root mean squares
relative to the weights: of what has been learned in all, and of the distance between that and the codes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common.experiments import encoded_reviews
from quantized_ways import FOLD, FORMATS, WAYS, config, load
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from zo_hf import ZOTrainer
from zo_hf.subspaces.code_rounding import NewRows
from zo_hf.subspaces.folded import Folded
from zo_hf.subspaces.sites import Site
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.prompts import LabelWordCollator
from zo_hf.tasks.refusals import refusals_end_the_command


class FoldErrors(TrainerCallback):
    """Sums up what a run learns in quantized weights, and feeds the errors of its folds back if asked.

    Args:
        keep: whether a fold rounds the sum of all that has been learned, which holds the errors of earlier folds.

    Attributes:
        first: the weights before training, by name, float32.
        learned: W + Σ B · Vᵀ over all folds, by name, float32.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.first: dict[str, Tensor] = {}
        self.learned: dict[str, Tensor] = {}
        self._sites: list[Site] = []

    def of(self, trainer: ZOTrainer) -> None:
        """Follow a run of a trainer."""
        self._trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace methods of the run's subspace."""
        self.follow(self._trainer.zo.subspace)

    def follow(self, subspace: Folded) -> None:
        """Replace the methods of a subspace that fold and that give a fold its rows."""
        self._sites = [site for site in subspace.sites if site.layer is not None]
        self.first = self.decoded()
        self.learned = dict(self.first)
        fold, rows_of = subspace.fold, subspace._new_rows
        sums: dict[str, Tensor] = {}

        def new_rows(site: Site, decay: float) -> NewRows:
            plain = rows_of(site, decay)

            def rows(storage: dict[str, Tensor], start: int, stop: int) -> Tensor:
                return sums[site.name][start:stop].clone() if self.keep and sums else plain(storage, start, stop)

            return rows

        @torch.no_grad()
        def fold_and_add(step: int, decay: Mapping[str, float]) -> None:
            if not subspace.at_origin:
                sums.update(
                    (site.name, self.learned[site.name] + subspace._rows(site, 0, site.shape[0]))
                    for site in self._sites
                )
                self.learned = dict(sums)
            fold(step, decay)
            sums.clear()

        methods: dict[str, Callable] = {"fold": fold_and_add, "_new_rows": new_rows}
        vars(subspace).update(methods)

    def decoded(self) -> dict[str, Tensor]:
        """Return the present weights, by name, float32."""
        layers = {site.name: site.layer for site in self._sites if site.layer is not None}
        return {name: layer.dequantize(layer.storage(), 0, layer.shape[0]).clone() for name, layer in layers.items()}

    def relative(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
        """Return the distance of some weights from others, relative to the weights before training."""
        squares = sum(float((weights[name] - others[name]).square().sum()) for name in weights)
        return (squares / sum(float(weight.square().sum()) for weight in self.first.values())) ** 0.5


def arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--model", default=str(default_model()), help="a causal language model; default: the embedded SmolLM2-135M")
    add("--format", default="nf4", choices=list(FORMATS), help="format of the weights: %(choices)s (%(default)s)")
    add("--roundings", nargs="+", default=["stochastic", "gptq"], help="values of zo_fold_rounding (%(default)s)")
    add("--fold-steps", type=int, default=100, help="steps between folds (%(default)s)")
    add("--learning-rate", type=float, default=9e-7, help="learning rate (%(default)s)")
    add("--steps", type=int, default=300, help="steps of a run (%(default)s)")
    add("--batch-size", type=int, default=8, help="sentences in a step (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (%(default)s)")
    add("--output", type=Path, default=Path("out/fold_error_feedback"), help="folder of the runs (%(default)s)")
    return parser.parse_args()


def run(args: argparse.Namespace, rounding: str, keep: bool, seed: int) -> tuple[float, ...]:
    """Train; return the held-out loss before and after, how far the weights have moved, and the codes' distance."""
    WAYS["fold"] = WAYS["fold"][0], FOLD | {"zo_fold_steps": args.fold_steps, "zo_fold_rounding": rounding}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, held_out = encoded_reviews(tokenizer, 1024, 128, seed, words=range(8, 13))
    model = load(args.model, args.format, "fold", seed)
    trainer = ZOTrainer(
        model,
        config(args.output, "fold", seed, args.learning_rate, args.steps, args.batch_size),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=LabelWordCollator(tokenizer, model),
    )
    trainer.remove_callback(PrinterCallback)
    errors = FoldErrors(keep)
    errors.of(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    moved, distance = (errors.relative(errors.learned, others) for others in (errors.first, errors.decoded()))
    return before, after, moved, distance


def main() -> None:
    args = arguments()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about every cast of an input
    print("| rounding | errors | seed | loss before | after | learned | codes from learned |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for rounding in args.roundings:
        for keep in (False, True):
            for seed in args.seeds:
                before, after, moved, distance = run(args, rounding, keep, seed)
                errors = "kept" if keep else "dropped"
                print(
                    f"| {rounding} | {errors} | {seed} | {before:.2f} | {after:.2f} | {moved:.1%} | {distance:.1%} |"
                )


if __name__ == "__main__":
    with refusals_end_the_command():
        main()
