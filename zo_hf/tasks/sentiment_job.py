"""Teach a language model to label sentences, with forward passes only.

    zo-hf train                       OPT-125M on SST-2, from the hub
    zo-hf train --offline             SmolLM2-135M on Rotten Tomatoes sentences, embedded; needs no hub
    zo-hf train --model_name_or_path MODEL --train_file reviews.csv --text_column review --label_column stars \\
        --template "{text} It was" --verbalizers " bad" " okay" " good"

Prints the accuracy of the untrained model, of the trained one and of always answering the most frequent label;
the forward passes and the time that training took; and its peak memory beside that of inference. --output_dir gets
the trained model with its tokenizer and prompt.json (see `zo-hf predict`), metrics.json and run.png.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.trainer_callback import ProgressCallback

from zo_hf.checkpoint import ADAPTER_CONFIG_NAME
from zo_hf.config import ZOConfig
from zo_hf.directions import DISTRIBUTIONS, Run
from zo_hf.estimators import ESTIMATORS
from zo_hf.memory import PeakMemory
from zo_hf.model_setup import check_model, make_subspace
from zo_hf.stability.found_text import one_line
from zo_hf.tasks.assets import AssetError
from zo_hf.tasks.classify import accuracy, calibrated, label_prior, label_scores, majority_accuracy
from zo_hf.tasks.data import LabelledSentences
from zo_hf.tasks.job_arguments import JobArguments, parse_arguments
from zo_hf.tasks.label_word_loss import LabelWordLoss
from zo_hf.tasks.progress import LossAndAccuracyBar
from zo_hf.tasks.prompts import LabelWordCollator, Prompt, encode_example, label_token_ids
from zo_hf.tasks.run_plot import plot_run
from zo_hf.tasks.saved_prompt import save_prompt
from zo_hf.tasks.sources import EMBEDDED_MODEL, choose_sources, load_sentences, model_path
from zo_hf.trainer import ZOTrainer


def main(
    argv: list[str] | None = None,
    prog: str | None = None,
    config_file: Path | None = None,
    description: str | None = None,
) -> None:
    """Run the job as a command.

    Args:
        argv: the command line without the program's name.
        config_file: a YAML file with this command's defaults.
        description: the head of its help; default: this module's.
    """
    try:
        job, config = parse_arguments(argv, prog, description or __doc__, config_file)
        task = prepare(job, config)
    except (AssetError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    run(task, config)


@dataclass(frozen=True)
class Task:
    """Everything that is evaluated and trained.

    Attributes:
        model_name: for people; the model itself is `model`, inside a PEFT model where an adapter trains.
        label_ids: the token that stands for label 0, 1, ...
        loss: "label_words" or "vocabulary", see `JobArguments`.
        max_length: tokens of prompt, sentence and label, at most.
        num_progress: held-out sentences scored during training, at most.
    """

    model_name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    sentences: LabelledSentences
    prompt: Prompt
    label_ids: list[int]
    loss: str
    max_length: int
    num_progress: int


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on all held-out sentences; `prior` is the label prior that `calibrated_accuracy` subtracts."""

    accuracy: float
    calibrated_accuracy: float
    prior: Tensor


def prepare(job: JobArguments, config: ZOConfig) -> Task:
    """Load the model and the sentences; the first line printed says where the embedded default stands in.

    Raises:
        AssetError, OSError, ValueError: the model, sentences or prompt are not as the options say.
    """
    say = line_printer(config)
    sources = choose_sources(job)
    if sources.notice:
        say(sources.notice)
    prompt = Prompt(job.template, tuple(job.verbalizers))
    with config.main_process_first(desc="fetching the model and the sentences"):
        sentences = load_sentences(job, sources, config.seed)
        tokenizer, model = load_model(model_path(sources), job, config)
    label_ids = label_token_ids(tokenizer, prompt)
    check_model(model, config)  # says now what training would say later
    subspace = make_subspace(model, config, None)
    if not ESTIMATORS[config.zo_estimator].along_coordinates:
        DISTRIBUTIONS[config.zo_direction](Run(subspace, config.zo_num_directions, config.zo_active_layers))
    name = sources.model or EMBEDDED_MODEL
    say(f"model      {name}, {model.num_parameters() / 1e6:.0f}M parameters, on {config.device}")
    say(f"sentences  {sentences.name}: {len(sentences.train)} to train on, {len(sentences.held_out)} held out")
    return Task(
        name, model, tokenizer, sentences, prompt, label_ids, job.loss, job.max_length, job.num_progress_examples
    )


def run(task: Task, config: ZOConfig) -> dict[str, Any]:
    """Evaluate, train, evaluate again and write `config.output_dir`; returns the content of metrics.json."""
    say = line_printer(config)
    batch_size = config.per_device_eval_batch_size
    majority = majority_accuracy(task.sentences.held_out["label"][:])
    with PeakMemory() as inference_memory:
        before = evaluate(task, batch_size)
    say(f"majority   {majority:.3f}")
    say(f"zero-shot  {before.accuracy:.3f} raw, {before.calibrated_accuracy:.3f} calibrated")

    trainer = build_trainer(task, config)
    started = time.perf_counter()
    with PeakMemory() as training_memory:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    training_seconds = time.perf_counter() - started
    forward_passes = last_logged(trainer.state.log_history, "zo/forward_passes")
    after = evaluate(replace(task, model=trainer.model), batch_size)
    say(f"trained    {after.accuracy:.3f} raw, {after.calibrated_accuracy:.3f} calibrated")
    if trainer.found_learning_rate is not None:
        say(f"rate       {one_line(trainer.found_learning_rate)}")
    say(f"cost       {forward_passes:.0f} forward passes, {training_seconds:.0f} s")
    say(f"memory     {training_memory.mib:.0f} MiB peak in training, {inference_memory.mib:.0f} MiB in inference")

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
        "forward_passes": forward_passes,
        "training_seconds": training_seconds,
        "inference_peak_mib": inference_memory.mib,
        "training_peak_mib": training_memory.mib,
    }
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(config.output_dir)
        is_adapter = (folder / ADAPTER_CONFIG_NAME).exists()
        save_prompt(folder, task.prompt, after.prior, quantization_of(task.model) if is_adapter else None)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        say(f"written    {folder}: the model, prompt.json, metrics.json")
        if find_spec("matplotlib") is None:
            say("no plot    install matplotlib for run.png")
        else:
            baselines = {
                "zero-shot": before.accuracy,
                "zero-shot calibrated": before.calibrated_accuracy,
                "majority": majority,
            }
            plot_run(trainer.state.log_history, baselines, after.accuracy, folder / "run.png")
            say(f"plotted    {folder / 'run.png'}")
    return metrics


def load_model(path: str, job: JobArguments, config: ZOConfig) -> tuple[PreTrainedTokenizerBase, Any]:
    """Load the tokenizer and the model, quantised and with an adapter where the job says so, on the job's device.

    Raises:
        OSError: there is no such model, or the hub did not give it.
    """
    more: dict[str, Any] = {}
    if job.load_in_8bit or job.load_in_4bit:
        more = {"device_map": {"": config.device}, "quantization_config": quantization(job)}
    attention = {"attn_implementation": "eager"} if ESTIMATORS[config.zo_estimator].needs_tangents else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=job.offline)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=job.dtype, local_files_only=job.offline, **more, **attention
        )
    except OSError as error:
        raise OSError(
            f"--model_name_or_path {path} could not be loaded: name the folder of a model, "
            f"or use the embedded one with --offline alone. ({str(error).splitlines()[0]})"
        ) from error
    if not more:
        model.to(config.device)
    if job.use_peft:
        from peft import LoraConfig, get_peft_model

        targets = job.lora_target_modules
        torch.manual_seed(config.seed)  # PEFT draws the adapter from torch's own generator
        lora = LoraConfig(
            r=job.lora_r,
            lora_alpha=job.lora_alpha,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return tokenizer, model.eval()


def quantization_of(model: Any) -> dict[str, Any] | None:
    """How a model was quantised, as `from_pretrained` takes it."""
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else json.loads(json.dumps(config.to_dict(), default=str))


def quantization(job: JobArguments) -> BitsAndBytesConfig:
    """How transformers is to quantise the model."""
    if job.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=job.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=None if job.dtype == "auto" else job.dtype,
    )


def build_trainer(task: Task, config: ZOConfig) -> ZOTrainer:
    """A `ZOTrainer` on the encoded sentences that reports accuracy on some held-out ones as it goes."""

    def encode(rows: Dataset) -> Dataset:
        return Dataset.from_list(
            [
                encode_example(task.tokenizer, task.prompt, row["text"], task.label_ids[row["label"]], task.max_length)
                for row in rows
            ]
        )

    def label_logits(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        # The last position is the label token itself: the one before predicts it.
        return (logits[0] if isinstance(logits, tuple) else logits)[:, -2, task.label_ids]

    def progress_accuracy(prediction: EvalPrediction) -> dict[str, float]:
        # Every other label is -100, wherever the padding of gathered batches put the label token.
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
        trainer.add_callback(LossAndAccuracyBar())
    return trainer


def evaluate(task: Task, batch_size: int) -> Evaluation:
    """Score all held-out sentences."""
    texts, labels = task.sentences.held_out["text"][:], task.sentences.held_out["label"][:]
    scores = label_scores(task.model, task.tokenizer, texts, task.prompt, batch_size, task.max_length)
    prior = label_prior(task.model, task.tokenizer, task.prompt)
    return Evaluation(accuracy(scores, labels), accuracy(calibrated(scores, prior), labels), prior)


def last_logged(log_history: list[dict[str, Any]], key: str) -> float:
    """The newest logged value of `key`; nan where it was never logged."""
    return next((entry[key] for entry in reversed(log_history) if key in entry), float("nan"))


def line_printer(config: ZOConfig) -> Callable[[str], None]:
    """`print` on the first process, nothing on the others."""
    is_first = config.process_index == 0

    def say(line: str) -> None:
        if is_first:
            print(line, flush=True)

    return say
