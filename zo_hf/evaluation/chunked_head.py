"""The head of a causal language model at some positions at a time, so that the logits of a batch never exist as a whole.

    hidden states (rows, length, d)  →  positions 0 … k-1, k … 2k-1, …  →  logits (rows, k, V)  →  a loss for every token

Nothing is kept for a backward pass, so a chunk leaves one number for every token. A chunk has the same positions of all
rows, so that rows with parameters of their own stay in their places. The model's own forward makes logits of hidden
states, with every scale and cap that it has: it runs on a stand-in whose decoder returns the hidden states of a chunk.

Before a run relies on it, a few positions of a batch are evaluated in both ways in one forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from zo_hf.evaluation.known_losses import IGNORED, known_loss, loss_kind, losses_of_tokens
from zo_hf.evaluation.output_hooks import may_change_outputs
from zo_hf.evaluation.precision import coarsest, same_but_for_order, same_but_for_rounding
from zo_hf.offload import computing_devices, is_offloaded
from zo_hf.parallel.shards import is_divided_model

logger = logging.getLogger(__name__)

#: Tokens whose logits exist at a time. A GPU would spend more time on reading the head's weight for fewer of them.
TOKENS = 1024

#: Inputs with which the positions of the hidden states are those of the labels.
_KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}
_KNOWN_INPUTS |= {"shift_labels", "logits_to_keep", "use_cache", "seq_idx"}
_KNOWN_INPUTS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class ChunkedHead:
    """Computes the losses of tokens in chunks.

    Args:
        forward: the module to call, e.g. the model itself or a wrapper of accelerate or PEFT around it.
        model: the transformers model inside.
    """

    def __init__(self, forward: nn.Module, model: PreTrainedModel) -> None:
        self._forward, self._model = forward, model

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a batch has labels for the tokens of its rows, and nothing that this class does not know."""
        ids, labels = inputs.get("input_ids"), inputs["labels"]
        is_known = inputs.keys() <= _KNOWN_INPUTS and not may_change_outputs(self._model)
        keeps = isinstance(inputs.get("logits_to_keep"), Tensor) or not inputs.get("logits_to_keep")
        return is_known and keeps and isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape == labels.shape

    def agrees(self, inputs: Mapping[str, Any], count: Tensor | int | None) -> bool:
        """Return whether the model's own loss is that of its tokens, and chunks give the same.

        One forward pass over the last positions of a batch, with its tokens as labels, shows both.

        Args:
            inputs: the batch.
            count: divisor in place of the number of labels, see `num_items_in_batch` of Trainer; None if it has none.
        """
        if not self.may_divide():
            return False
        ids = inputs["input_ids"]
        ids = ids[:, -max(2, TOKENS // len(ids)) :]
        sample = {"input_ids": ids, "labels": ids}
        more = {} if count is None else {"num_items_in_batch": count}
        targets = nn.functional.pad(ids, (0, 1), value=IGNORED)[:, 1:]
        try:
            run = _Chunks(self._model, targets, None, max(1, ids.shape[1] // 2), ends=False)
            outputs = run(self._forward, sample | more)
            whole = losses_of_tokens(outputs["logits"], targets)
            known = known_loss(self._model, outputs["logits"], sample, count)
            dtype = coarsest(self._model, run.dtype)
            return same_but_for_order(outputs["loss"], known) and same_but_for_rounding(run.losses, whole, dtype)
        except Exception as error:  # a model that needs more than tokens, or that calls its decoder in another way
            logger.debug("the head of %s does not take positions in chunks: %s", type(self._model).__name__, error)
            return False

    def losses(self, inputs: Mapping[str, Any], targets: Tensor, kept: Tensor | None) -> Tensor:
        """Return the cross entropy of every token, float32 (rows, positions), from one forward pass.

        Args:
            inputs: the batch, without labels.
            targets: the token that each position predicts, int64 (rows, positions); `IGNORED` gives 0.
            kept: these positions, int64 (positions,); None for all of the batch.
        """
        run = _Chunks(self._model, targets, kept, max(1, TOKENS // len(targets)), ends=True)
        run(self._forward, inputs)
        return run.losses

    def may_divide(self) -> bool:
        """Return whether the model's loss may be that of its tokens, with nothing around its head that a chunk would not see."""
        model = self._model
        return (
            loss_kind(model) is ForCausalLMLoss
            and _path_of_decoder(model) is not None
            and next(model.parameters(recurse=False), None) is None  # no subspace would enter where they are read
            and ("_hf_hook" not in model.__dict__ or is_offloaded(model))  # whose hook moves inputs, and nothing else
            and not is_divided_model(model)
            and len(computing_devices(model)) == 1
            and not is_compiled_module(self._forward)
        )


class _Chunks:
    """One forward pass, with the losses of its tokens.

    Args:
        model: the transformers model.
        targets: see `ChunkedHead.losses`.
        kept: see there.
        size: positions of a chunk.
        ends: True ends the pass with the chunks; its outputs are then those of the first position alone.

    Attributes:
        dtype: the dtype in which the model has computed logits.
    """

    def __init__(self, model: PreTrainedModel, targets: Tensor, kept: Tensor | None, size: int, ends: bool) -> None:
        self._model, self._targets, self._kept, self._size, self._ends = model, targets, kept, size, ends
        path = _path_of_decoder(model)
        assert path is not None
        self._path = path
        self._parts: list[Tensor] = []
        self.dtype: torch.dtype | None = None

    def __call__(self, forward: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Call the module, and return its outputs."""
        # Inside of every wrapper, so that a chunk is computed under the same autocast as the rest of the model.
        handle = self._model.get_submodule(self._path).register_forward_hook(self._at_the_end)
        try:
            return forward(**inputs)
        finally:
            handle.remove()

    @property
    def losses(self) -> Tensor:
        """The cross entropy of every token, float32 (rows, positions)."""
        return torch.cat(self._parts, 1)

    def _at_the_end(self, _: nn.Module, args: Any, output: Any) -> Any:
        """Compute the losses from the decoder's output."""
        hidden = output[0] if self._kept is None else output[0][:, self._kept]
        if self._parts or hidden.shape[:2] != self._targets.shape:
            raise ValueError(f"the decoder returns {tuple(hidden.shape)} for targets of {tuple(self._targets.shape)}.")
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)  # a model may look at their shape
        forward = type(self._model).forward
        for part, targets in zip(hidden.split(self._size, 1), self._targets.split(self._size, 1), strict=True):
            stand_in: Any = _standing_in(self._model, self._path, _with_hidden(output, part))
            logits = forward(stand_in, input_ids=ids, use_cache=False)[0]
            self.dtype = logits.dtype
            self._parts.append(losses_of_tokens(logits, targets))
            del logits  # or they would be there beside those of the next chunk
        return _with_hidden(output, output[0][:, :1]) if self._ends else None


def _path_of_decoder(model: PreTrainedModel) -> str | None:
    """Return the path of the module whose output the head reads, or None if it is the model itself."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a decoder's output with other hidden states, which are its first entry."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, next(iter(output)): hidden})


def _standing_in(module: nn.Module, path: str, output: Any) -> nn.Module:
    """Return a module that shares everything with `module`, except that the one at `path` returns `output`."""
    stand_in: nn.Module = object.__new__(type(module))
    stand_in.__dict__.update(module.__dict__)
    if not path:
        stand_in.__dict__ |= {"forward": lambda *_, **__: output, "_forward_hooks": {}, "_forward_pre_hooks": {}}
        return stand_in
    name, _, rest = path.partition(".")
    child = module._modules[name]
    assert child is not None
    stand_in.__dict__["_modules"] = {**module._modules, name: _standing_in(child, rest, output)}
    return stand_in
