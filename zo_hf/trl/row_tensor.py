"""Tensors that know the rows of a batch, so that the sum over a batch keeps the share of every row.

A loss of TRL ends in a mean over rows, pairs or tokens. `RowTensor` marks what a model returns, and goes along with operations
that leave rows apart:

    log_probs (rows, length) -> sum(1) (rows,) -> logsigmoid (rows,) -> mean () = RowSum

A `RowSum` is that mean, bit for bit, together with its shares, (rows,). Any other operation mixes rows, and so does every
operation on its result. The loss then stays whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_ELEMENTWISE = "add sub subtract mul multiply div divide true_divide rsub neg negative pow square sqrt abs exp expm1"
_ELEMENTWISE += (
    " log log1p sigmoid logsigmoid log_sigmoid softplus relu tanh clamp clamp_min clamp_max where masked_fill"
)
_ELEMENTWISE += " to float double half bfloat16 type_as contiguous clone detach __add__ __radd__ __sub__ __rsub__"
_ELEMENTWISE += " __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __neg__ __pow__ __rpow__"
_SUMS = ("sum", "mean")
_COPIES = ("to", "float", "double", "clone")


def _spellings(name: str, operation: Callable) -> dict[str, Callable]:
    spelled = (name, f"{name}_", f"__{name}__", f"__i{name}__")
    return dict.fromkeys(spelled, operation)


_SCALES = {
    **_spellings("mul", operator.mul),
    **_spellings("div", operator.truediv),
    **_spellings("truediv", operator.truediv),
    "multiply": operator.mul,
    "true_divide": operator.truediv,
    "divide": operator.truediv,
    "__rmul__": operator.mul,
}
_LINEAR = {
    **_SCALES,
    **_spellings("add", operator.add),
    **_spellings("sub", operator.sub),
    **_spellings("neg", operator.neg),
    "__radd__": operator.add,
    "__rsub__": lambda subtracted, other: other - subtracted,
    "rsub": lambda subtracted, other: other - subtracted,
}


class Marked(Tensor):
    """A tensor computed from a model's outputs; any result of an operation on it is marked, too."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Marked)]
        with torch._C.DisableTorchFunctionSubclass():
            shares = _shares(name, func, inputs, args, kwargs)  # first, because the operation may work in place
            result = func(*args, **kwargs)
            if name == "__get__":  # a property, such as the shape
                return tree_map(_mixed, result) if isinstance(result, Tensor) else result
            if name == "__iter__":
                return iter([row_tensor(part, 0) for part in result])
            if shares is not None:
                return row_sum(result, shares)
            marked = _marked(name, inputs, args, kwargs, tree_map(plain, result))
            target = args[0] if args else None
            if isinstance(target, RowTensor) and (result is target or name == "__setitem__") and not _is_apart(marked):
                target.rows = 0
            return marked


class RowTensor(Marked):
    """A tensor in which every element belongs to one row of a batch.

    Attributes:
        rows: the number of rows; 0 if an operation has mixed the rows.
        row_of: the row of every element, int64 of this tensor's shape. None if the first dimension is that of the rows,
            (rows, ...), or first of all rows' first parts and then of their second parts, (2 · rows, ...).
    """

    rows: int
    row_of: Tensor | None


class RowSum(Marked):
    """A sum over the rows of a batch, (), which keeps their shares in it, or an expanded one.

    Attributes:
        shares: the shares, (rows,).
    """

    shares: Tensor


def row_tensor(tensor: Tensor, rows: int, row_of: Tensor | None = None) -> RowTensor:
    """Mark a tensor; the arguments are the attributes of `RowTensor`."""
    marked = tensor.as_subclass(RowTensor)
    marked.rows, marked.row_of = rows, row_of
    return marked


def row_sum(tensor: Tensor, shares: Tensor) -> RowSum:
    """Mark a sum over rows, (), with its shares, (rows,)."""
    marked = tensor.as_subclass(RowSum)
    marked.shares = shares
    return marked


def plain(value: Any) -> Any:
    """Return a marked tensor without its marks, and any other value as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Marked) else value


def _mixed(value: Any) -> Any:
    return row_tensor(value, 0) if isinstance(value, Tensor) else value


def _is_apart(value: Any) -> bool:
    return isinstance(value, RowTensor) and value.rows > 0


def _marked(name: str, inputs: list[Marked], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
    """Return an operation's result with its marks.

    Args:
        name: name of the operation.
        inputs: its marked inputs.
        args: its inputs, of which the first is the tensor of a method.
        kwargs: its inputs by keyword.
        result: plain tensors or other values.
    """
    first, mixed = inputs[0], tree_map(_mixed, result)
    if not isinstance(first, RowTensor) or not all(_belong_together(first, other) for other in inputs):
        return mixed
    if name.removesuffix("_") in _ELEMENTWISE.split() or name in _ELEMENTWISE.split():
        same = isinstance(result, Tensor) and all(result.shape == other.shape for other in inputs)
        return row_tensor(result, first.rows, first.row_of) if same else mixed
    if args[0] is not first or len(inputs) > 1:
        return mixed
    if name in _SUMS and len(args) == 1 and not kwargs:
        return _summed(first, result, name)
    if first.row_of is not None:
        return mixed
    if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
        fits = args[1].shape == first.shape and len(first) == first.rows
        return row_tensor(result, first.rows, args[1].nonzero()[:, 0]) if fits else mixed
    if name == "chunk" and len(first) == 2 * first.rows and _value(args, kwargs, 1, "chunks") == 2:
        halves = _value(args, kwargs, 2, "dim") in (0, None)
        return tuple(row_tensor(half, first.rows) for half in result) if halves else mixed
    return row_tensor(result, first.rows) if _leaves_rows(name, first, args, kwargs) else mixed


def _belong_together(one: RowTensor, other: Marked) -> bool:
    return _is_apart(other) and isinstance(other, RowTensor) and one.rows == other.rows and one.row_of is other.row_of


def _summed(tensor: RowTensor, result: Tensor, name: str) -> Tensor:
    """Return the sum or mean of all elements with the shares of the rows, if every row has elements."""
    values = tensor.as_subclass(Tensor)
    divisor = values.numel() if name == "mean" else 1
    if tensor.row_of is not None:
        shares = values.new_zeros(tensor.rows).index_add(0, tensor.row_of.flatten(), values.flatten())
    elif len(values) == tensor.rows:
        shares = values.flatten(1).sum(1) if values.ndim > 1 else values
    else:
        return _mixed(result)
    return row_sum(result, shares / divisor)


def _leaves_rows(name: str, tensor: RowTensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation with other dimensions than the first leaves that as it is."""
    last = (-1, tensor.ndim - 1)
    if tensor.ndim < 2:
        return False
    if name in (*_SUMS, "log_softmax", "softmax", "logsumexp", "squeeze"):
        dim = _value(args, kwargs, 1, "dim")
        return dim in last or dim in ([-1], (-1,))
    if name == "gather":
        return _value(args, kwargs, 1, "dim") in last
    if name == "__getitem__":
        key = args[1] if isinstance(args[1], tuple) else (args[1],)
        starts_later = key[0] is Ellipsis and len(key) <= tensor.ndim
        whole = isinstance(key[0], slice) and key[0] == slice(None)
        return (starts_later or whole) and all(isinstance(k, slice | int) for k in key[1:])
    return False


def _value(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _shares(
    name: str, func: Callable, inputs: list[Marked], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Return the shares of a linear operation on sums over rows, (rows,), or None if it is another operation."""
    sums = [value for value in inputs if isinstance(value, RowSum)]
    if not sums or len(sums) < len(inputs) or any(len(other.shares) != len(sums[0].shares) for other in sums):
        return None
    if name == "expand" or (name == "mean" and len(args) == 1 and not kwargs):
        return sums[0].shares  # all elements are the sum
    if name in _COPIES:
        return func(sums[0].shares, *args[1:], **kwargs)
    if kwargs or name not in _LINEAR or (name in _SCALES and (len(sums) > 1 or args[0] is not sums[0])):
        return None
    parts = [_part(value, name in _SCALES, len(sums[0].shares)) for value in args]
    return None if any(part is None for part in parts) else _LINEAR[name](*parts)


def _part(value: Any, scales: bool, rows: int) -> Any:
    """Return what stands for an input of a linear operation on shares; None if nothing does.

    Args:
        value: the input: a sum over rows, another tensor or a number.
        scales: True for a product or a quotient.
        rows: number of rows.
    """
    if isinstance(value, RowSum):
        return value.shares
    if isinstance(value, Tensor) and value.numel() > 1:
        return None
    if scales:
        return value
    if isinstance(value, Tensor):
        # A term of the batch belongs to no row, unless it is switched off.
        return None if value.any() else 0.0
    return value / rows
