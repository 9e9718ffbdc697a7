"""`EvolutionTrainer`: a model learns from rewards of the text that it generates, without a backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import has_length

from zo_hf.lr_finder.find import LRFinderResult
from zo_hf.rewards.config import NO_SEARCH, EvolutionConfig
from zo_hf.rewards.generation import Generator
from zo_hf.rewards.losses import RewardLosses
from zo_hf.rewards.metrics import RewardMetrics
from zo_hf.rewards.prompts import PromptCollator, completion_of
from zo_hf.rewards.scoring import Rewards, reward_functions
from zo_hf.rewards.served import ServedGenerator
from zo_hf.rewards.table import AnsweredPrompts
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.trainer.fsdp import fsdp_settings
from zo_hf.trainer.trainer import ZOTrainer

#: The step that keys the random numbers of evaluations, so that all of them sample alike.
_EVALUATION = -1


class EvolutionTrainer(ZOTrainer):
    """Moves a causal language model towards answers with a higher reward, by an evolution strategy.

    In each step, the members of a population answer a batch of prompts. The step follows the members whose answers have a
    higher reward than those of the others to the same prompt. It takes what TRL's GRPOTrainer takes.

    Args:
        model: a causal language model, or its name or path.
        reward_funcs: a function, the name or path of a sequence classifier, or the classifier itself; or a list of these. A
            function is called with `prompts`, `completions`, `completion_ids`, `trainer_state` and the other columns of the
            data set, all as lists by keyword except the state. It returns one number for each completion. One of several
            functions may return None for completions that it does not rate.
        args: an `EvolutionConfig`.
        train_dataset: rows with a column `prompt`, a text or a list of messages, and any others.
        eval_dataset: rows of the same kind; an evaluation answers each prompt once.
        processing_class: the model's tokenizer. Default: the one of the model's name.
        reward_processing_classes: the tokenizers of reward models. Default: those of their names.
        callbacks: Trainer's callbacks.
        optimizers: an optimizer and a schedule of your own.
        optimizer_cls_and_kwargs: see Trainer.
        peft_config: wraps the model in a PEFT adapter.

    Raises:
        ValueError: an argument cannot work; the message names it and the way out.
    """

    args: EvolutionConfig
    generator: Generator | ServedGenerator

    @property
    def _losses_kind(self) -> Any:
        return RewardLosses

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any,
        args: EvolutionConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            args = EvolutionConfig(output_dir="tmp_trainer")
        if not isinstance(args, EvolutionConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; EvolutionTrainer needs a zo_hf.rewards.EvolutionConfig."
            )
        if fsdp_settings(args) is not None:
            raise ValueError("fsdp=... does not work with EvolutionTrainer, because it generates; leave it out.")
        _check_data(args, train_dataset, eval_dataset)
        init: Any = args.model_init_kwargs or {}
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **init)
        name = _checked(model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(f"processing_class is a {type(processing_class).__name__}; give the model's tokenizer.")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        ends = _end_tokens(model, processing_class)
        pad = processing_class.pad_token_id
        pad = next(iter(ends), 0) if pad is None else pad  # it is masked, so the choice has no effect
        template: Any = args.chat_template_kwargs or {}
        super().__init__(
            model=model,
            args=args,
            data_collator=PromptCollator(processing_class, pad, args.max_prompt_length, template),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        functions = reward_functions(reward_funcs, reward_processing_classes, args.device, init, template)
        self._rewards = Rewards(functions, args.reward_weights)
        if args.server_url is None:
            self.generator = Generator(lambda: self.model, args, pad, ends, self.compute_loss_context_manager)
        else:
            self.generator = ServedGenerator(lambda: self.served, args, ends)
        self._answered: AnsweredPrompts | None = None
        self._evaluated = 0

    def find_learning_rate(self) -> LRFinderResult:
        """Refuse a search.

        Raises:
            ValueError: always; the message says what to do instead.
        """
        raise ValueError(NO_SEARCH)

    def new_metrics(self) -> RewardMetrics:
        """Return metrics of rewards and answers that have seen none."""
        return RewardMetrics(self._rewards.names, self._ranks, self.args.device)

    def score(self, batch: dict[str, Any], rows: Sequence[int], answers: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the rewards of answers by every function, (answers, functions), and their weighted sums, (answers,).

        Args:
            batch: a batch of prompts.
            rows: index of every answer's prompt within the batch.
            answers: tokens of every answer.

        Raises:
            RewardError: a reward function fails; the message names it.
        """
        tokenizer: Any = self.processing_class
        prompts = [batch["prompts"][row] for row in rows]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        completions = [completion_of(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        columns = {name: [values[row] for row in rows] for name, values in batch["columns"].items()}
        rewards = self._rewards.of(
            len(answers),
            columns
            | {
                "prompts": prompts,
                "completions": completions,
                "completion_ids": [list(answer) for answer in answers],
                "trainer_state": self.state,
            },
        )
        by_name = dict(zip(self._rewards.names, rewards.T.tolist(), strict=True))
        self._answered = AnsweredPrompts(prompts, completions, by_name)
        return rewards, self._rewards.total(rewards)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Let the population answer one micro-batch of prompts; after the step's last one, estimate the gradient.

        Returns:
            Minus the mean reward of the step for its last micro-batch, and 0 for the others, float32, ().
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._losses.metrics.end_step()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Answer every prompt of a batch once; returns minus the mean reward, float32, (), and no predictions."""
        inputs = self._prepare_inputs(inputs)
        rows = range(len(inputs["prompts"]))
        first = (self._evaluated * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        self._evaluated += 1
        answers = self.generator.answers(inputs, rows, first, _EVALUATION)
        rewards, totals = self.score(inputs, rows, answers)
        # Several processes get the first prompts once more, so that their batches are equal.
        own = [row for row in rows if first + row < self._to_evaluate]
        if own:
            kept = [answers[row] for row in own]
            self._eval_metrics.see(rewards[own], totals[own].view(-1, 1), kept, self.generator.ends)
        return -totals.mean().to(self.args.device, torch.float32), None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, and add the metrics of rewards and answers."""
        self._evaluated = 0
        self._to_evaluate = self.num_examples(dataloader) if has_length(dataloader.dataset) else math.inf
        self._eval_metrics = self.new_metrics()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if self.zo is None and self._serving is not None:
            self._serving.close()
        self._eval_metrics.end_step()
        found = self._eval_metrics.means()
        del found["frac_reward_zero_std"]  # every prompt has one answer
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as ZOTrainer does, with the metrics of rewards and answers, and print the answers if that is asked for."""
        is_training = self.zo is not None and "loss" in logs
        if is_training:
            logs |= self._losses.metrics.means()
        super().log(logs, *args, **kwargs)
        if is_training and self.args.log_completions and self.is_world_process_zero() and self._answered is not None:
            self._answered.show(self.state.global_step, self.args.num_completions_to_print)


def _check_data(args: EvolutionConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse data without prompts, and a stream that one process would have to send to the others.

    Raises:
        ValueError: the data is such; the message names the argument and the way out.
    """
    dispatches = args.world_size > 1 and args.accelerator_config.dispatch_batches is not False
    if isinstance(train_dataset, IterableDataset) and dispatches:
        raise ValueError(
            "a streamed train_dataset is read by one process for all, which cannot send texts to the others; set "
            "accelerator_config={'dispatch_batches': False}."
        )
    for option, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        columns = data.column_names if isinstance(data, datasets.Dataset | datasets.IterableDataset) else None
        if columns is not None and "prompt" not in columns:
            raise ValueError(
                f"{option} has the columns {', '.join(columns) or 'none'}; EvolutionTrainer needs a column 'prompt', with "
                "texts or lists of messages."
            )


def _checked(model: Any) -> str:
    """Return a model's name or path.

    Raises:
        ValueError: it is no causal language model.
    """
    inner = base_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate() or inner.config.is_encoder_decoder:
        raise ValueError(
            f"model is a {type(model).__name__}; EvolutionTrainer needs a causal language model, or its name or path."
        )
    return str(inner.config._name_or_path)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the model's, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    ends = [*own, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else own
    return list(dict.fromkeys(ends))
