"""Activations in front of the first layer that moves, computed once for every row of the data.

If only the last layers of a model move, the layers in front of them give the same features for a row at every probe and in
every epoch. `FeatureCache` computes them when it first sees the row, and keeps them in the CPU's memory. Later forward passes
take them from there, and cost only the layers from the first moving one on.

The features of a row come from a forward pass of that row alone, without its padding. They depend on no other row, so a
resumed run, or another number of processes, finds the same bits.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zo_hf.evaluation.layer_stack import layer_stack

logger = logging.getLogger(__name__)

#: Largest relative difference between the features of a row alone and in its batch that rounding explains.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}

#: Inputs with a value for every token.
_OF_TOKENS = ("input_ids", "token_type_ids", "position_ids")

#: Inputs that leave features as they are: the loss, the head or the caller reads them, and a causal model passes them on.
_BEHIND = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "use_cache", "return_dict")

#: Flags that ask for outputs of the layers in front, which do not run.
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")

_WAY_OUT = "use zo_feature_cache_gib=0"


class _Reached(Exception):
    """Ends a forward pass behind the last layer in front."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class FeatureCache:
    """Keeps the features of rows, and lets the model's forward passes take them from there.

    Args:
        model: a transformers model, without a wrapper of PEFT.
        moving: the modules that hold or read what moves.
        gib: memory for features in GiB. The features of rows beyond it are computed once for every batch.

    Attributes:
        layers_run: layers that rows have gone through, each row and layer counted once per forward pass.
        layers_asked: the same without a cache.

    Raises:
        ValueError: the model has no single stack of layers, or its first layer moves.
    """

    def __init__(self, model: nn.Module, moving: Collection[nn.Module], gib: float) -> None:
        stack = layer_stack(model, moving)
        self._model, self._front, self._layers = stack.model, stack.layers[: stack.front], len(stack.layers)
        behind = {module for layer in stack.layers[stack.front :] for module in layer.modules()}
        self._names = {
            module: name for name, module in model.named_modules() if module in moving and module not in behind
        }
        self._signature = inspect.signature(self._model.forward)
        self._bytes_left = int(gib * 2**30)
        self._is_full = False
        self._kept: dict[bytes, Tensor] = {}  # (length, width) for each row
        self._of_last_pass: dict[bytes, Tensor] = {}  # also those that are not kept, for the other probes of a batch
        self._features: Tensor | None = None  # (rows, length, width), for the pass under way
        self._mask = torch.ones(0, 0, dtype=torch.bool)  # (rows, length), the pass's tokens
        self._kind: tuple[Any, ...] = ()
        self._compared: set[tuple[Any, ...]] = set()
        self._moving_in_front: list[str] = []
        self._watchers: list[RemovableHandle] = []
        self._is_alone = self._gives_tuple = False
        self.layers_run = self.layers_asked = 0

    def __len__(self) -> int:
        """Return the number of rows whose features are kept."""
        return len(self._kept)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Give the model's forward passes the features of their rows inside this context.

        A forward pass inside raises ValueError if the features do not follow from its inputs, if something in front moves, or
        if a row alone has other features than in its batch.
        """
        handle = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        previous = [layer.__dict__.get("forward") for layer in self._front]
        for place, layer in enumerate(self._front, start=1):
            layer.forward = functools.partial(self._in_front, place == len(self._front), layer.forward)
        try:
            yield
        finally:
            handle.remove()
            self._stop_watching()
            for layer, forward in zip(self._front, previous, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
            self._features, self._of_last_pass = None, {}

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the features of the rows of a forward pass that begins."""
        if self._is_alone:
            return
        inputs, self._mask = self._of_tokens(args, kwargs)
        values, tokens = {name: value.cpu() for name, value in inputs.items()}, self._mask.cpu()
        found: dict[bytes, Tensor] = {}
        of_rows, computed = [], 0
        for row, here in enumerate(tokens):
            alone = {name: value[row, here] for name, value in values.items()}
            key = b"".join(name.encode() + value.long().numpy().tobytes() for name, value in alone.items())
            if key not in found and len(alone["input_ids"]):
                features = self._kept.get(key, self._of_last_pass.get(key))
                if features is None:
                    features, computed = self._compute(alone, kwargs.get("attention_mask") is not None), computed + 1
                    self._keep(key, features)
                found[key] = features
            of_rows.append(found.get(key))
        if not found:
            raise ValueError(
                f"zo_feature_cache_gib needs a token in every batch, and attention_mask is 0; {_WAY_OUT}."
            )
        self._of_last_pass = found
        some = next(iter(found.values()))
        padded = some.new_zeros(*tokens.shape, some.shape[-1])
        padded[tokens] = torch.cat([features for features in of_rows if features is not None])
        self._features = padded.to(self._mask.device)
        self._kind = (tuple(values), bool(tokens[:, 0].all()), bool(tokens[:, -1].all()))
        if self._kind not in self._compared:
            self._watch()
        front = len(self._front)
        self.layers_asked += len(tokens) * self._layers
        self.layers_run += len(tokens) * (self._layers - front * (self._kind in self._compared)) + computed * front

    def _of_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs with a value for every token, and a mask of the tokens, bool (rows, length).

        Raises:
            ValueError: the features depend on other inputs, too.
        """
        given = dict(self._signature.bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        output = next((name for name in _OUTPUTS if given.pop(name, None)), None)
        if output is not None:
            raise ValueError(
                f"zo_feature_cache_gib leaves out the layers in front, whose outputs {output}=True asks for; {_WAY_OUT}."
            )
        given = {
            name: value for name, value in given.items() if value is not None and name not in (*_BEHIND, *_OUTPUTS)
        }
        ids, mask = given.get("input_ids"), given.pop("attention_mask", None)
        inputs = {name: given.pop(name) for name in _OF_TOKENS if name in given and given[name].ndim <= 2}
        other = next(iter(given), None)
        if other is not None or ids is None:
            raise ValueError(
                f"zo_feature_cache_gib needs features that follow from input_ids, and the model also gets "
                f"{other or 'no input_ids'}; {_WAY_OUT}."
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"zo_feature_cache_gib needs an attention_mask of shape {tuple(ids.shape)}, not {tuple(mask.shape)}; {_WAY_OUT}."
            )
        tokens = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        runs = tokens[:, 0] + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
        if "position_ids" not in inputs and bool((runs > 1).any()):
            raise ValueError(
                "zo_feature_cache_gib computes a row without its padding, and leaving out a 0 of attention_mask between tokens "
                f"would change their positions; pass position_ids, or {_WAY_OUT}."
            )
        return {name: value.expand(ids.shape) for name, value in inputs.items()}, tokens

    def _compute(self, row: Mapping[str, Tensor], masks: bool) -> Tensor:
        """Return the features of a row alone, (length, width).

        Args:
            row: the row's inputs, each (length,).
            masks: whether the model gets an attention mask.
        """
        device = self._mask.device
        inputs = {name: value[None].to(device) for name, value in row.items()}
        if masks:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        self._is_alone = True
        try:
            self._model(**inputs)
        except _Reached as reached:
            return reached.features[0].cpu()
        finally:
            self._is_alone = False
        raise ValueError(f"zo_feature_cache_gib found layers in front that the model does not call; {_WAY_OUT}.")

    def _keep(self, key: bytes, features: Tensor) -> None:
        size = features.nbytes + len(key)
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._kept[key] = features
        elif not self._is_full:
            self._is_full = True
            logger.warning(
                "zo_feature_cache_gib is used up by the features of %d rows; those of other rows are computed again in every step",
                len(self._kept),
            )

    def _in_front(self, is_last: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for a layer in front: pass on its input, or return the features if it is the last one."""
        compares = not self._is_alone and self._kind not in self._compared
        if not self._is_alone and not compares:
            return self._as_output(self._features if is_last else args[0] if args else kwargs["hidden_states"])
        output = forward(*args, **kwargs)
        if not is_last:
            return output
        self._gives_tuple = isinstance(output, tuple)
        features = output[0] if self._gives_tuple else output
        if self._is_alone:
            raise _Reached(features)
        self._compare(features)
        return self._as_output(self._features)

    def _as_output(self, features: Any) -> Any:
        return (features,) if self._gives_tuple else features

    def _compare(self, in_batch: Tensor) -> None:
        """Compare the features that a pass has computed with those of its rows alone.

        Raises:
            ValueError: something in front moves, or they differ.
        """
        self._stop_watching()
        if self._moving_in_front:
            raise ValueError(
                f"zo_feature_cache_gib cannot keep features, because {self._moving_in_front[0]} in front of them moves; leave it "
                f"out with zo_exclude_modules=..., or {_WAY_OUT}."
            )
        assert self._features is not None
        expected, actual = in_batch[self._mask].float(), self._features[self._mask].float()
        difference = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        if not difference <= _ROUNDING.get(in_batch.dtype, _ROUNDING[torch.bfloat16]):
            raise ValueError(
                f"zo_feature_cache_gib needs rows that do not depend on their batch, and alone a row's features differ by "
                f"{difference:.2g} of their size; pad on the right, pass position_ids, or {_WAY_OUT}."
            )
        self._compared.add(self._kind)

    def _watch(self) -> None:
        """Note which moving modules are called until the last layer in front."""
        self._moving_in_front = []
        for module, name in self._names.items():
            self._watchers.append(
                module.register_forward_pre_hook(lambda *_, name=name: self._moving_in_front.append(name))
            )

    def _stop_watching(self) -> None:
        while self._watchers:
            self._watchers.pop().remove()
