"""A model whose layers are divided among the processes of a pipeline: who holds which weights, and the freeing of the rest.

    stage s holds      its layers, equally many for each stage, and the first stages have one more if there is a remainder
    the first holds    the embedding of the tokens, too
    the last holds     the output layer, too
    both hold          everything else outside of the layers
    all hold           coordinates, buffers, and an adapter's weights

Coordinates are small. As every process holds all of them, updates, optimizer, log, replay and resuming are those of processes
that hold whole models.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.evaluation.layer_stack import single_stack
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.evaluation.pipeline import Stage
from zo_hf.offload import computing_devices
from zo_hf.parallel.absent import has_absent, is_absent, let_go, note_holder
from zo_hf.parallel.channel import Channel
from zo_hf.parallel.checksum import tensor_checksum
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.quantization import stored_tensors
from zo_hf.subspaces.peft_methods import base_model

logger = logging.getLogger(__name__)

_OPTION = "zo_parallel='pipeline'"
_WAY_OUT = "use zo_parallel='data', or fsdp=... for a model that does not fit on one device"


class Pipeline:
    """Divides the layers of a run's model among processes; a `Division`.

    Args:
        ranks: the processes that train together.
        device: the device of this process.
        timeout: seconds to wait for another process.

    Attributes:
        base_hash: `weights_hash` of the model when it was divided; None once its weights have changed.
        stage: the stage of this process; None before the model is divided.
    """

    base_hash: str | None = None
    facts: frozenset[str] = frozenset()
    stage: Stage | None = None

    def __init__(self, ranks: Ranks, device: torch.device, timeout: float) -> None:
        self._ranks, self._device, self._timeout = ranks, device, timeout

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model whose layers the stages cannot divide.

        Raises:
            ValueError: it is one; the message says why.
        """
        self.layers_of(model)

    def shard(self, model: nn.Module, adapter: bool) -> None:
        """Divide the model in place and for good, with the first process's weights; one that is divided stays as it is.

        Args:
            model: the model, whole on every process.
            adapter: True if the trainable parameters are an adapter's, which stay whole.

        Raises:
            ValueError: the model's layers cannot be divided so; the message says why.
        """
        if has_absent(model):
            return
        grid, inner = self._ranks.grid, base_model(model)
        layers = self.layers_of(model)
        parts = divided(len(layers), grid.stages)
        whole = {id(p) for p in model.parameters() if adapter and p.requires_grad}
        holders = _holders(inner, layers, parts)
        self._make_equal(model)
        for parameter in model.parameters():
            held_by = holders.get(id(parameter), set())
            if not held_by or id(parameter) in whole or parameter.numel() < 2:
                parameter.data = parameter.data.to(self._device)
                continue
            note_holder(parameter, min(held_by))
            if grid.stage in held_by:
                parameter.data = parameter.data.to(self._device)
            else:
                let_go(parameter, self._device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self._device)
            module.register_state_dict_post_hook(_leave_out_absent)
        channel = Channel(self._ranks, self._device, self._timeout)
        self.stage = Stage(inner, layers, parts[grid.stage], channel)
        model.register_load_state_dict_pre_hook(_refuse_to_load)
        own = parts[grid.stage]
        logger.info("stage %d of %d has layers %d to %d", grid.stage, grid.stages, own[0], own[-1])

    def passes(self, closure: Any, zo: ZerothOrder) -> AbstractContextManager[None]:
        """Return the context of the forward passes that evaluate a loss: streaming, once nobody looks at outputs.

        The first passes of a run tell which function of the logits the loss is, and how to evaluate it. The loss of a
        subclass may do anything with outputs, and every stage needs them then.
        """
        assert self.stage is not None
        rows = zo.row_groups
        by_rows = rows is not None and bool(rows.comes_apart) and not rows.may_choose
        is_decided = zo.evaluator.batched is not None or by_rows
        streams = isinstance(closure, ModelLoss) and closure.is_settled and is_decided
        return self.stage.streaming() if streams else nullcontext()

    def enter(self, evaluator: ProbeEvaluator, model: nn.Module) -> None:
        """Let an evaluator know that all processes make its forward passes together."""
        assert self.stage is not None
        evaluator.recover, evaluator.expect = self.recover, self.stage.expect

    def check_steps(self, zo: ZerothOrder, grid: Grid, parallel: str) -> None:
        """Refuse nothing: every stage has a part in each forward pass of a step."""

    def recover(self) -> None:
        """Go on after a forward pass that has raised, unless the other stages are in the middle of it."""
        assert self.stage is not None
        if self.stage.has_failed:
            raise RuntimeError(
                "a forward pass failed in one stage of the pipeline; set zo_batched_probes=False and smaller batches."
            )

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the stack of layers that the stages divide.

        Raises:
            ValueError: there is none, or it has fewer layers than there are stages; the message says so.
        """
        if len(computing_devices(model)) > 1:
            raise ValueError(
                f"{_OPTION} does not combine with a model that device_map has put on several devices; load it without one."
            )
        _, layers = single_stack(base_model(model), _OPTION, _WAY_OUT)
        if len(layers) < self._ranks.grid.stages:
            raise ValueError(
                f"{_OPTION} cannot divide {len(layers)} layers among {self._ranks.grid.stages} stages; set "
                f"zo_pipeline_stages={len(layers)} or fewer."
            )
        return layers

    @torch.no_grad()
    def _make_equal(self, model: nn.Module) -> None:
        """Give every process the first one's weights; only those cross the network that differ, such as a new head's."""
        held = (*stored_tensors(model).values(), *model.parameters(), *model.buffers())
        tensors = list({id(tensor): tensor for tensor in held}.values())
        sums = torch.tensor([tensor_checksum(tensor) - (1 << 63) for tensor in tensors])
        everyone = self._ranks.all_gather(sums.to(self._device)).cpu()
        for tensor, differs in zip(tensors, (everyone != everyone[0]).any(0).tolist(), strict=True):
            if differs:
                sent = tensor.detach().to(self._device)
                self._ranks.broadcast(sent)
                tensor.data.copy_(sent)


def divided(layers: int, stages: int) -> list[range]:
    """Return the layers of every stage: equally many, and one more for the first stages if there is a remainder."""
    each, more = divmod(layers, stages)
    starts = [stage * each + min(stage, more) for stage in range(stages + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def _holders(model: Any, layers: nn.ModuleList, parts: list[range]) -> dict[int, set[int]]:
    """Return the stages that hold each parameter of a transformers model, by the parameter's id."""
    holders: dict[int, set[int]] = defaultdict(set)
    last = len(parts) - 1
    inside = set(layers.modules())
    ends = {model.get_input_embeddings(): {0}, model.get_output_embeddings(): {last}}
    of_end = {part: stages for end, stages in ends.items() if end is not None for part in end.modules()}
    stage_of = {index: stage for stage, part in enumerate(parts) for index in part}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            holders[id(parameter)].add(stage_of[index])
    for module in model.modules():
        if module not in inside:
            for parameter in module.parameters(recurse=False):
                holders[id(parameter)] |= of_end.get(module, {0, last})
    return holders


def _leave_out_absent(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Let a state dict hold weights of other processes on the meta device, where nobody takes them for values."""
    for name, parameter in module._parameters.items():
        held: Tensor | None = state.get(prefix + name)
        # With keep_vars=True the caller asks for the parameters themselves.
        if parameter is not None and held is not None and held is not parameter and is_absent(parameter):
            state[prefix + name] = held.to("meta")


def _refuse_to_load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    missing = next((n for n, p in module.named_parameters() if is_absent(p) and prefix + n in state), None)
    if missing is not None:
        raise ValueError(
            f"load_state_dict cannot write {missing}, which another stage of the pipeline holds; load weights before the "
            "trainer begins, or resume from a checkpoint."
        )
