# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft]"]
# ///
"""Teach SmolLM2-135M sentiment with a serving engine as the forward pass: a population of LoRA adapters on vLLM.

    python recipes/served_sentiment.py --server http://127.0.0.1:8000               # continues if interrupted
    python recipes/served_sentiment.py --server http://127.0.0.1:8000 --reward      # by a reward for the generated word
    python recipes/served_sentiment.py --server http://127.0.0.1:8000 --noise 100   # how exact its c are, and no training

`python3 run.py serve` starts the server; docs/guides/serving.md says more.

The model reads "Review: {review}", "Sentiment:", and learns the next word, " negative" or " positive". Each step takes the
losses of a population on one batch of reviews. With --reward, the population answers the reviews, and a member gets 1 for the
right word and 0 for any other. Before and after, the server itself answers held-out reviews with the adapter. Without
--server, this process evaluates the population.

With --noise N, it compares c along N directions with this process, at several distances.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common.sentiment_answers import as_prompts, exact_match
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from zo_hf import ZerothOrder, ZOConfig, ZOTrainer
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.rewards import EvolutionConfig, EvolutionTrainer
from zo_hf.serving import ServedModel, Servers
from zo_hf.serving.losses import ServedLoss
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.command_line import CommandParser
from zo_hf.tasks.console import command
from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_B, encode_example, encode_prompt, label_token_ids
from zo_hf.tasks.refusals import refusals_end_the_command

WORDS = range(8, 13)  # of a sentence
LONGEST = 64


def arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--server", action="append", help="address of a server; may be given several times")
    parser.add_argument(
        "--model", help="a causal language model, by folder or name; default: the embedded SmolLM2-135M"
    )
    parser.add_argument("--steps", type=int, default=50, help="number of steps (%(default)s)")
    parser.add_argument("--directions", type=int, default=4, help="half of the population (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="reviews of a step (%(default)s)")
    parser.add_argument("--held-out", type=int, default=64, help="reviews that are answered at the end (%(default)s)")
    parser.add_argument("--eps", type=float, help="distance of the population (3e-2; with --reward, 2e-1)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of Adam (%(default)s)")
    parser.add_argument("--max-loras", type=int, default=8, help="the servers' --max-loras (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sentences and directions (%(default)s)")
    parser.add_argument("--reward", action="store_true", help="learn from a reward for the generated word")
    parser.add_argument("--noise", type=int, help="number of directions along which to compare c")
    distances = [1e-3, 1e-2, 3e-2, 1e-1]
    parser.add_argument("--distances", type=float, nargs="+", default=distances, help="of --noise (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/served_sentiment"), help="folder of the run")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    path = args.model or str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = with_lora(AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval())
    words = label_token_ids(tokenizer, PROMPT_B)
    sentences = embedded_reviews(4000, args.held_out, args.seed, WORDS)
    train = [encode_example(tokenizer, PROMPT_B, row["text"], words[row["label"]], LONGEST) for row in sentences.train]
    collate = DataCollatorForSeq2Seq(tokenizer, padding="longest")
    if args.noise is not None:
        for line in noise(model, collate(train[: args.rows]), args):
            print(line, flush=True)
        return
    prompts = [encode_prompt(tokenizer, PROMPT_B, text, LONGEST) for text in sentences.held_out["text"]]
    right = [words[label] for label in sentences.held_out["label"]]

    common: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [StepTimes()]}
    trainer: ZOTrainer
    if args.reward:
        evolution = EvolutionConfig(**options(args), population=2 * args.directions, max_completion_length=1)
        data = as_prompts(sentences.train, PROMPT_B)
        trainer = EvolutionTrainer(model, exact_match, evolution, train_dataset=data, **common)
    else:
        config = ZOConfig(**options(args), zo_num_directions=args.directions)
        trainer = ZOTrainer(model, config, train_dataset=Dataset.from_list(train), data_collator=collate, **common)
    results: dict[str, Any] = {}
    if args.server:
        results["before"] = answered(trainer, prompts, right)
    last = get_last_checkpoint(str(args.output)) if args.output.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    if args.server:
        results["after"] = answered(trainer, prompts, right)
    results["log"] = trainer.state.log_history
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that runs by a loss and by a reward share."""
    shared = {
        "output_dir": str(args.output),
        "server_url": args.server,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.rows,
        "zo_rows_per_direction": 0,
        "zo_eps": args.eps if args.eps is not None else 2e-1 if args.reward else 3e-2,
        "optim": "adamw_torch",
        "learning_rate": args.learning_rate,
        "save_steps": 10,
        "save_only_trajectory": True,
        "logging_steps": 5,
        "use_cpu": True,
        "report_to": [],
        "seed": args.seed,
    }
    return shared | ({"server_max_loras": args.max_loras} if args.server else {})


class StepTimes(TrainerCallback):
    """Prints the time of the steps at the end."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times = [time.monotonic()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        taken = sorted(b - a for a, b in zip(self.times, self.times[1:], strict=False))
        if taken:
            print(f"{len(taken)} steps of {taken[len(taken) // 2]:.2f} seconds (median)", flush=True)


def with_lora(model: Any) -> Any:
    """Return the model with an adapter of rank 4 on its linear layers, the same at every call."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))


def answered(trainer: ZOTrainer, prompts: list[list[int]], right: list[int]) -> float:
    """Return how often the server's next word is the right one, with the trainer's adapter, and print it."""
    ask = trainer.served.completions(prompts, {"max_tokens": 1, "temperature": 0.0})
    found = trainer.served.as_it_is(ask)
    part = sum(tokens == [token] for tokens, token in zip(found, right, strict=True)) / len(right)
    print(f"the server's next word is right for {part:.3f} of {len(right)} held-out reviews", flush=True)
    return part


def noise(model: Any, batch: dict[str, Any], args: Any) -> Iterator[str]:
    """Yield the lines of a table of c along the same directions, by servers and by this process."""
    yield "| ε | c, root mean square | error of the server's c | correlation |"
    yield "|---:|---:|---:|---:|"
    for eps in args.distances:
        zo = ZerothOrder(model, "adapter", eps=eps, num_directions=args.noise, batched_probes=False, seed=args.seed)
        own = zo.estimate(ModelLoss(model, model.get_base_model(), batch, lambda inputs: model(**inputs).loss))
        served = ServedModel(model, Servers(args.server, args.max_loras, None, 600.0), zo)
        theirs = zo.estimate(ServedLoss(served, zo.subspace, batch, None))
        served.close()
        zo.finish()
        exact, found = (torch.tensor(e.projected_gradients, dtype=torch.float64) for e in (own, theirs))
        error = (found - exact).square().mean().sqrt()
        correlation = torch.corrcoef(torch.stack((exact, found)))[0, 1]
        yield f"| {eps:g} | {exact.square().mean().sqrt():.3f} | {error:.4f} | {correlation:.4f} |"


if __name__ == "__main__":
    with command(), refusals_end_the_command():
        main()
