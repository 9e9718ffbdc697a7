"""Steps of GPipe (Huang et al. 2019, arXiv:1811.06965), by `torch.distributed.pipelining`, to time them.

A step sends M micro-batches forward through S stages and then back. The time of a backward pass is a multiple of that of a
forward pass.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

#: The time of a backward pass, in forward passes.
BACKWARD = 2


class SleepInBackward(torch.autograd.Function):
    """The identity. Its backward pass sleeps."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, seconds: float) -> torch.Tensor:
        """Return `hidden`, and remember for how many seconds to sleep."""
        ctx.seconds = seconds
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Sleep, and return the gradient as it is."""
        time.sleep(ctx.seconds)
        return gradients[0], None


class Stage(torch.nn.Module):
    """One layer of a model; the first stage has the embeddings as well, and the last one the head.

    Args:
        model: the whole model. Its layers sleep in their forward passes.
        index: which layer.
        seconds: time that a layer sleeps in a forward pass.
    """

    def __init__(self, model: LlamaForCausalLM, index: int, seconds: float) -> None:
        super().__init__()
        self.embed = model.model.embed_tokens if index == 0 else torch.nn.Identity()
        self.rotary, self.layer = model.model.rotary_emb, model.model.layers[index]
        is_last = index == len(model.model.layers) - 1
        self.head = torch.nn.Sequential(model.model.norm, model.lm_head) if is_last else torch.nn.Identity()
        self.seconds = seconds

    def forward(
        self,
        given: torch.Tensor,  # (rows, tokens) ids, or (rows, tokens, hidden)
    ) -> torch.Tensor:
        """Return the hidden states, (rows, tokens, hidden); the last stage returns logits, (rows, tokens, words)."""
        hidden = self.embed(given)
        places = torch.arange(hidden.shape[1])[None]
        hidden = self.layer(hidden, position_embeddings=self.rotary(hidden, places))
        return self.head(SleepInBackward.apply(hidden, BACKWARD * self.seconds))


def seconds_of_steps(
    model: LlamaForCausalLM, ids: torch.Tensor, micro_batches: int, steps: int, seconds: float
) -> list[float]:
    """Train for some steps over all processes of the default group, one stage each, and return the seconds of each step.

    Args:
        model: the model, with as many layers as there are processes. It is the same in all of them.
        ids: token ids of a step, (rows, tokens); the labels are the same.
        micro_batches: number of micro-batches of a step.
        steps: number of steps.
        seconds: time that a layer sleeps in a forward pass.
    """
    index, stages = torch.distributed.get_rank(), torch.distributed.get_world_size()
    module = Stage(model, index, seconds)
    stage = PipelineStage(module, index, stages, torch.device("cpu"))

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    schedule = ScheduleGPipe(stage, micro_batches, loss_fn=loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        torch.distributed.barrier()
        start = time.monotonic()
        given = (ids,) if index == 0 else ()
        schedule.step(*given, **({"target": ids} if index == stages - 1 else {}))
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.barrier()
        found.append(time.monotonic() - start)
    return found
