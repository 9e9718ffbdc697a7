"""Fine-tune a language model to label sentences, with forward passes only.

    zo-hf train                       OPT-125M on SST-2, from the hub
    zo-hf train --offline             SmolLM2-135M on embedded Rotten Tomatoes sentences, without a hub
    zo-hf train --model_name_or_path MODEL --train_file reviews.csv --text_column review --label_column stars \\
        --template "{text} It was" --verbalizers " bad" " okay" " good"

The command prints the accuracy of the untrained model, of the trained model, and of always answering the most frequent
label. It also prints the number of forward passes, the training time, and the peak memory of training and of inference.
It saves the trained model with its tokenizer and prompt.json (see `zo-hf predict`), metrics.json and run.png in
--output_dir.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Module
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from zo_hf.checkpoint import holds_adapter
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.memory.peak import PeakMemory
from zo_hf.parallel.agreement import check_agreement
from zo_hf.parallel.ranks import Ranks
from zo_hf.tasks.classify import accuracy, calibrated, label_prior, label_scores, majority_accuracy
from zo_hf.tasks.console import command
from zo_hf.tasks.data import LabeledSentences
from zo_hf.tasks.job_arguments import JobArguments, parse_arguments
from zo_hf.tasks.job_command import run_as_command
from zo_hf.tasks.job_model import load_model, load_tokenizer, quantization_of
from zo_hf.tasks.job_run import METRICS, PLOT, Spent, line_printer, print_cost, train, write_results
from zo_hf.tasks.label_word_head import label_words_alone
from zo_hf.tasks.label_word_loss import LabelWordLoss, scores_of_labels
from zo_hf.tasks.progress import LatestValuesBar
from zo_hf.tasks.prompts import LabelWordCollator, Prompt, encode_example, label_token_ids
from zo_hf.tasks.run_plot import plot_run
from zo_hf.tasks.saved_prompt import FILE_NAME, save_prompt
from zo_hf.tasks.sources import EMBEDDED_MODEL, choose_sources, load_sentences, with_model_path
from zo_hf.trainer.common_arguments import common_arguments
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.output_paths import check_folder
from zo_hf.trainer.setup import check_model, grid_of
from zo_hf.trainer.trainer import ZOTrainer

PATHS = ("model_name_or_path", "train_file", "validation_file")
#: Files that a run writes at its end, beside the model.
WRITTEN = (FILE_NAME, METRICS, PLOT)


def main(
    argv: list[str] | None = None,
    prog: str | None = None,
    config_file: Path | None = None,
    description: str | None = None,
) -> None:
    """Run the job as a command. A wrong argument ends it with one sentence and exit code 2.

    Args:
        argv: the command line without the program's name.
        prog: the program's name in the help.
        config_file: a YAML file with this command's defaults.
        description: the text at the top of the help; default: this module's docstring.
    """
    run_as_command(
        lambda: parse_arguments(argv, prog, description or __doc__, config_file), prepare, build_trainer, run
    )


@dataclass(frozen=True)
class Task:
    """The model, the sentences and the prompt of a job.

    Attributes:
        model_name: the model's name for display.
        model: the model, inside a PEFT model if an adapter is trained.
        tokenizer: the model's tokenizer.
        sentences: the training and held-out sentences.
        prompt: the prompt around a sentence.
        label_ids: the token of label 0, 1, ...
        loss: "label_words" or "vocabulary", see `JobArguments`.
        max_length: maximum number of tokens in prompt, sentence and label.
        num_progress: maximum number of held-out sentences that are scored during training.
        moving: the modules that read what moves.
    """

    model_name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    sentences: LabeledSentences
    prompt: Prompt
    label_ids: list[int]
    loss: str
    max_length: int
    num_progress: int
    moving: frozenset[Module] = frozenset()


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on all held-out sentences; `calibrated_accuracy` subtracts the label prior `prior`, (labels,)."""

    accuracy: float
    calibrated_accuracy: float
    prior: Tensor


def prepare(job: JobArguments, config: ZOConfig) -> Task:
    """Load the model and the sentences; if the embedded default is used, the first printed line says so.

    Raises:
        AssetError, OSError, ValueError: the model, the sentences or the prompt do not match the options, or the
            options do not go together.
        ReplicasDiffer: another process was started with other options.
    """
    print_line = line_printer(config)
    # Paths may differ between machines; what they lead to is compared later.
    alike = {name: value for name, value in asdict(job).items() if name not in PATHS}
    check_agreement(Ranks(grid_of(config)), alike | common_arguments(config), config.device)
    if config.should_save:
        check_folder("--output_dir", config.output_dir, *WRITTEN)
    sources = choose_sources(job)
    if sources.notice:
        print_line(sources.notice)
    prompt = Prompt(job.template, tuple(job.verbalizers))
    with config.main_process_first(desc="fetching the model and the sentences"):
        sentences = load_sentences(job, sources, config.seed)
        tokenizer, model = with_model_path(
            sources, lambda path: (load_tokenizer(path, job), load_model(path, job, config))
        )
    label_ids = label_token_ids(tokenizer, prompt)
    check_model(model, config)  # says now what training would say later
    settings = config.settings()
    subspace = settings.make_subspace(model)
    subspace.check_end()
    if not settings.moves_along_coordinates:
        DISTRIBUTIONS[settings.direction](subspace.direction_context(settings.num_directions, settings))
    name = sources.model or EMBEDDED_MODEL
    print_line(f"model      {name}, {model.num_parameters() / 1e6:.0f}M parameters, on {config.device}")
    print_line(f"sentences  {sentences.name}: {len(sentences.train)} to train on, {len(sentences.held_out)} held out")
    moving = frozenset(module for site in subspace.sites for module, _ in site.uses)
    cut = (job.max_length, job.num_progress_examples)
    return Task(name, model, tokenizer, sentences, prompt, label_ids, job.loss, *cut, moving)


def run(task: Task, trainer: ZOTrainer, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Evaluate, train, evaluate again and write to the trainer's `output_dir`; return the content of metrics.json.

    Args:
        task: the model and the sentences.
        trainer: the trainer that `build_trainer` made for them.
        callbacks: further callbacks of the trainer.
    """
    config = trainer.args
    print_line = line_printer(config)
    batch_size = config.per_device_eval_batch_size
    majority = majority_accuracy(task.sentences.held_out["label"][:])
    with PeakMemory() as inference_memory:
        before = evaluate(task, batch_size)
    print_line(f"majority   {majority:.3f}")
    print_line(f"zero-shot  {before.accuracy:.3f} raw, {before.calibrated_accuracy:.3f} calibrated")

    # A compiled, sharded or divided model runs the output layer that it was made with.
    is_remade = config.torch_compile or config.fsdp or grid_of(config).stages > 1
    reads_label_words_alone = task.loss == "label_words" and not is_remade
    head = label_words_alone(task.model, task.label_ids, task.moving) if reads_label_words_alone else nullcontext()
    spent = train(trainer, callbacks, head)
    with command(lambda: f"the trained model is saved in {config.output_dir}, and its evaluation is not"):
        return report(task, trainer, before, spent, inference_memory.mib)


def report(task: Task, trainer: ZOTrainer, before: Evaluation, spent: Spent, inference_mib: float) -> dict[str, Any]:
    """Evaluate the trained model, print and write the results, and return the content of metrics.json.

    Args:
        task: the model and the sentences.
        trainer: the trainer, after training.
        before: the evaluation before training.
        spent: what the training took.
        inference_mib: peak memory of inference in MiB.
    """
    config = trainer.args
    majority = majority_accuracy(task.sentences.held_out["label"][:])
    after = evaluate(replace(task, model=trainer.model), config.per_device_eval_batch_size)
    line_printer(config)(f"trained    {after.accuracy:.3f} raw, {after.calibrated_accuracy:.3f} calibrated")
    print_cost(trainer, spent, inference_mib)
    metrics = {
        "model": task.model_name,
        "sentences": task.sentences.name,
        "train_examples": len(task.sentences.train),
        "held_out_examples": len(task.sentences.held_out),
        "majority_accuracy": majority,
        "zero_shot_accuracy": before.accuracy,
        "zero_shot_calibrated_accuracy": before.calibrated_accuracy,
        "accuracy": after.accuracy,
        "calibrated_accuracy": after.calibrated_accuracy,
        "forward_passes": spent.forward_passes,
        "training_seconds": spent.seconds,
        "inference_peak_mib": inference_mib,
        "training_peak_mib": spent.training_mib,
    }
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir)
        is_adapter = holds_adapter(folder)
        save_prompt(folder, task.prompt, after.prior, quantization_of(task.model) if is_adapter else None)
        baselines = {
            "zero-shot": before.accuracy,
            "zero-shot calibrated": before.calibrated_accuracy,
            "majority": majority,
        }
        history = trainer.state.log_history
        write_results(folder, metrics, FILE_NAME, lambda path: plot_run(history, baselines, after.accuracy, path))
    return metrics


def build_trainer(task: Task, config: ZOConfig) -> ZOTrainer:
    """Build a `ZOTrainer` on the encoded sentences, which reports accuracy on some held-out ones while it trains."""

    def encode(rows: Dataset) -> Dataset:
        return Dataset.from_list(
            [
                encode_example(task.tokenizer, task.prompt, row["text"], task.label_ids[row["label"]], task.max_length)
                for row in rows
            ]
        )

    def label_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        return scores_of_labels(logits[0] if isinstance(logits, tuple) else logits, torch.tensor(task.label_ids))

    def progress_accuracy(prediction: EvalPrediction) -> dict[str, float]:
        # All other labels are -100, so the maximum is the label token, wherever padding of gathered batches has put
        # it.
        answers = torch.as_tensor(prediction.label_ids).amax(dim=1)
        labels = [task.label_ids.index(answer) for answer in answers.tolist()]
        return {"accuracy": accuracy(torch.as_tensor(prediction.predictions), labels)}

    held_out = task.sentences.held_out
    trainer = ZOTrainer(
        task.model,
        config,
        train_dataset=encode(task.sentences.train),
        eval_dataset=encode(held_out.select(range(min(task.num_progress, len(held_out))))),
        data_collator=LabelWordCollator(task.tokenizer, task.model),
        processing_class=task.tokenizer,
        compute_loss_func=LabelWordLoss(task.label_ids) if task.loss == "label_words" else None,
        compute_metrics=progress_accuracy,
        preprocess_logits_for_metrics=label_logits,
    )
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(
            LatestValuesBar({"loss": "loss", "eval_accuracy": "accuracy", "zo/forward_passes": "forward passes"})
        )
    return trainer


def evaluate(task: Task, batch_size: int) -> Evaluation:
    """Score all held-out sentences."""
    texts, labels = task.sentences.held_out["text"][:], task.sentences.held_out["label"][:]
    scores = label_scores(task.model, task.tokenizer, texts, task.prompt, batch_size, task.max_length)
    prior = label_prior(task.model, task.tokenizer, task.prompt)
    return Evaluation(accuracy(scores, labels), accuracy(calibrated(scores, prior), labels), prior)
