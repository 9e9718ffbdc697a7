# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]"]
# ///
"""Teach SmolLM2-135M sentiment by a reward for its answer alone: 1 if the word that it generates is the right one, else 0.

    python recipes/sentiment_reward.py                   # some minutes of two idle cores; continues if interrupted
    python recipes/sentiment_reward.py --steps 30        # a short look
    python recipes/sentiment_reward.py --loss            # the same by a loss, for comparison
    python recipes/sentiment_reward.py --two-words       # choose between two words, as `zo-hf train --offline` does

The model reads "Review: {review}", "Sentiment:" and generates one word out of its whole vocabulary. The right one is
" negative" or " positive". No probability enters a step, so there is nothing to differentiate. Every prompt of a step is
answered by a pair of members of its own. --output gets a folder for each run, with results.json and the checkpoints, and
a plot of all runs.

With --loss, ZOTrainer minimizes the cross entropy of the right word out of the whole vocabulary, with as many forward passes of
as many rows, and with the other options of `zo-hf train`.

With --two-words, it reads "{review} It was" and can only generate " terrible" or " great". Without that restriction its word
is always " a", and all rewards are 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common.reward_runs import checkpoints, config, plot, run
from common.sentiment_answers import as_prompts, exact_match
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.rewards import EvolutionTrainer
from zo_hf.tasks.assets import default_model
from zo_hf.tasks.classify import accuracy, label_scores, majority_accuracy
from zo_hf.tasks.data import LabeledSentences, embedded_reviews
from zo_hf.tasks.job_arguments import RECIPE
from zo_hf.tasks.prompts import PROMPT_A, PROMPT_B, LabelWordCollator, Prompt, encode_example, label_token_ids

PROMPTS = 16
SAVE_STEPS = 10
EVAL_STEPS = 50
WORDS = range(8, 13)  # of a sentence
LONGEST = 64  # tokens of a prompt
LOSS_RATE = 2e-5  # that of `zo-hf train`, 1e-4, diverges with a loss over the whole vocabulary

#: Options without and with --two-words. One of the two words is far likelier for every review, so that no member ever
#: takes the other one unless it samples.
OPTIONS: dict[bool, dict[str, Any]] = {
    False: {"zo_eps": 5e-3, "learning_rate": 5e-3},
    True: {"zo_eps": 1e-2, "learning_rate": 1e-2, "temperature": 2.0},
}


def by_reward(
    model: Any, tokenizer: Any, sentences: LabeledSentences, prompt: Prompt, output: Path, **options: Any
) -> EvolutionTrainer:
    """Return a trainer that learns from rewards."""
    return EvolutionTrainer(
        model,
        exact_match,
        config(output, PROMPTS, SAVE_STEPS, max_completion_length=1, **options),
        train_dataset=as_prompts(sentences.train, prompt),
        eval_dataset=as_prompts(sentences.held_out, prompt),
        processing_class=tokenizer,
    )


def by_loss(
    model: Any, tokenizer: Any, sentences: LabeledSentences, prompt: Prompt, output: Path, **options: Any
) -> ZOTrainer:
    """Return a trainer that learns from the cross entropy of the right word."""
    label_ids = label_token_ids(tokenizer, prompt)

    def encoded(rows: Any) -> Any:
        return rows.map(
            lambda row: encode_example(tokenizer, prompt, row["text"], label_ids[row["label"]], LONGEST),
            remove_columns=rows.column_names,
        )

    return ZOTrainer(
        model,
        ZOConfig(
            **RECIPE | checkpoints(SAVE_STEPS) | options | {"output_dir": str(output), "learning_rate": LOSS_RATE}
        ),
        train_dataset=encoded(sentences.train),
        eval_dataset=encoded(sentences.held_out),
        data_collator=LabelWordCollator(tokenizer, model),
        compute_metrics=right_words,
        preprocess_logits_for_metrics=lambda logits, labels: logits[:, -2].argmax(-1),
    )


def right_words(prediction: EvalPrediction) -> dict[str, float]:
    """Return how often the likeliest word is the right one, under the name that a reward would have."""
    right = torch.as_tensor(prediction.label_ids).amax(1)  # all other labels are -100
    return {"reward": (torch.as_tensor(prediction.predictions) == right).double().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/sentiment_reward"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=200, help="number of steps")
    parser.add_argument("--held-out", type=int, default=200, help="number of test sentences")
    parser.add_argument("--seed", type=int, default=0, help="seed of sentences and directions")
    parser.add_argument("--two-words", action="store_true", help="let the model choose between two words")
    parser.add_argument("--loss", action="store_true", help="learn from a loss instead of rewards")
    arguments = parser.parse_args()
    if arguments.loss and arguments.two_words:
        parser.error("--loss does not work with --two-words; `zo-hf train --offline` is that run")
    prompt = PROMPT_A if arguments.two_words else PROMPT_B
    task = "two-words" if arguments.two_words else "any-word"
    folders = {"reward": arguments.output / task, "loss": arguments.output / f"{task}-by-loss"}

    model = AutoModelForCausalLM.from_pretrained(default_model(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    sentences = embedded_reviews(4000, arguments.held_out, arguments.seed, WORDS)
    options: dict[str, Any] = {
        "max_steps": arguments.steps,
        "seed": arguments.seed,
        "eval_steps": EVAL_STEPS,
        "per_device_eval_batch_size": PROMPTS,
    }
    output = folders["loss" if arguments.loss else "reward"] / f"seed-{arguments.seed}"
    common = (model, tokenizer, sentences, prompt, output)
    texts, labels = sentences.held_out["text"][:], sentences.held_out["label"][:]
    trainer: ZOTrainer
    if arguments.loss:
        trainer = by_loss(*common, **options)
    else:
        options |= OPTIONS[arguments.two_words]
        if arguments.two_words:
            words = set(label_token_ids(tokenizer, prompt))
            others = [token for token in range(model.config.vocab_size) if token not in words]
            options["generation_kwargs"] = {"suppress_tokens": others}
        trainer = by_reward(*common, **options)

    def measured(when: str) -> dict[str, float]:
        generated = trainer.evaluate()["eval_reward"]
        of_the_two = accuracy(label_scores(model, tokenizer, texts, prompt), labels)
        print(f"{when}: the right word {generated:.3f}, the likelier of the two words {of_the_two:.3f}", flush=True)
        return {"generated": generated, "of_the_two_words": of_the_two}

    majority = majority_accuracy(labels)
    print(f"majority {majority:.3f}", flush=True)
    run(trainer, measured, "eval_reward", majority=majority)
    plot(folders, "held-out reviews with the right next word", arguments.output / f"{task}.png")


if __name__ == "__main__":
    main()
