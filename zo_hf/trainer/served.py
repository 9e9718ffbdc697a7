"""A Trainer's use of servers: what it refuses, the served model of a training, and the losses that servers give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.known_losses import known_loss, loss_kind
from zo_hf.offload import computing_devices
from zo_hf.parallel.ranks import Ranks
from zo_hf.serving import ServedModel, Servers
from zo_hf.serving.adapter_files import check_servable
from zo_hf.serving.losses import ServedLoss
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.trainer.config import ZOConfig, addresses
from zo_hf.trainer.micro_batch import MicroBatch
from zo_hf.trainer.overrides import has_stock_contexts, has_stock_loss


class Serving:
    """The servers of a Trainer, and the served model while there is one.

    Args:
        args: the Trainer's arguments, with `server_url`.
    """

    def __init__(self, args: ZOConfig) -> None:
        urls, folder = addresses(args.server_url), args.server_folder
        self._servers = Servers(urls, args.server_max_loras, folder, args.server_timeout)
        self._served: ServedModel | None = None
        self._zo: ZerothOrder | None = None

    def of(self, model: Any, zo: ZerothOrder | None) -> ServedModel:
        """Return the served model; the first call for an engine compares the servers with it.

        Args:
            model: the Trainer's model.
            zo: the engine in it, if there is one.

        Raises:
            ServingError, ValueError: see `ServedModel`.
        """
        if self._served is None or self._zo is not zo:
            self.close()
            self._served, self._zo = ServedModel(model, self._servers, zo), zo
        return self._served

    def close(self) -> None:
        """Remove the files of the served model, if there is one."""
        served, self._served, self._zo = self._served, None, None
        if served is not None:
            served.close()


def check_served(model: nn.Module, args: ZOConfig) -> None:
    """Refuse a training that servers cannot evaluate.

    Raises:
        ValueError: it is one; the message names the argument and the way out.
    """
    if args.world_size > 1:
        raise ValueError(
            f"server_url=... is for one process, and there are {args.world_size}; start one, with a list of servers."
        )
    check_servable(model)


class ServedLosses:
    """Makes the loss of every micro-batch, which servers evaluate, and its weight in the step's loss.

    Args:
        trainer: the Trainer, whose loss must be that of a causal language model.
        ranks: unused.

    Raises:
        ValueError: its loss is another one; the message says which.
    """

    passes_beside, repeats = 0, False

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self._trainer = trainer
        if not has_stock_loss(trainer) or not has_stock_contexts(trainer) or trainer.label_smoother is not None:
            raise ValueError(
                "server_url=... takes the model's own loss, from probabilities of tokens; leave out compute_loss, "
                "compute_loss_func and label_smoothing_factor."
            )
        model: Any = base_model(trainer.model)
        if loss_kind(model) is not ForCausalLMLoss:
            raise ValueError(
                f"server_url=... takes the loss of a causal language model, and {type(model).__name__} has another; leave "
                "out server_url."
            )
        _check_loss(trainer.model, model)

    def of(self, model: Any, batch: MicroBatch, counts: bool = True) -> tuple[ServedLoss, float]:
        """Return the loss of a micro-batch, and its weight; the arguments are those of `MicroBatchLosses.of`."""
        trainer = self._trainer
        is_counted = trainer.model_accepts_loss_kwargs and batch.num_items is not None
        loss = ServedLoss(trainer.served, trainer.zo.subspace, batch.inputs, batch.num_items if is_counted else None)
        return loss, 1.0 if is_counted else 1.0 / batch.of_step


@torch.no_grad()
def _check_loss(model: nn.Module, inner: Any) -> None:
    """Refuse a model that adds terms of its own to the loss, such as the balance of a router."""
    rows: Sequence[int] = range(min(8, inner.config.get_text_config().vocab_size))
    ids = torch.tensor([list(rows)], device=computing_devices(model)[0])
    outputs = model(input_ids=ids, labels=ids)
    own, known = outputs["loss"].item(), known_loss(inner, outputs["logits"], {"labels": ids}, None).item()
    if not math.isclose(own, known, rel_tol=1e-3):
        raise ValueError(
            f"the loss of {type(inner).__name__} has terms of its own, which no server gives; set output_router_logits=False "
            "in its config, or leave out server_url."
        )
