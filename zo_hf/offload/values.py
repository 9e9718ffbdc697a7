"""A model's tensors with their values; offloaded ones are read only on request."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from zo_hf.offload.hooks import is_offloaded, offloaded_weights
from zo_hf.offload.weight import OffloadedWeight


class Values(Mapping[str, Tensor]):
    """The values of tensors by name.

    Args:
        weights: the model's offloaded weights, found before the tensors: that ties them again.
        tensors: tensors that the model's modules hold, by any name.
    """

    def __init__(self, weights: Mapping[str, OffloadedWeight], tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._weights = {id(weight.placeholder): weight for weight in weights.values()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        weight = self._weights.get(id(tensor))
        return tensor.detach() if weight is None else weight.value()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def whole_state_dict(model: nn.Module, among: Collection[nn.Module] | None = None) -> dict[str, Tensor]:
    """Return the state dict of a model with the values of its offloaded weights, which tied names share.

    Args:
        model: the model.
        among: if given, weights of other modules stay on the meta device.
    """
    if not is_offloaded(model):
        return model.state_dict()
    weights, named = offloaded_weights(model), model.state_dict(keep_vars=True)
    wanted = model.modules() if among is None else among
    read = {id(p) for module in wanted for p in (*module._parameters.values(), *module._buffers.values())}
    values, distinct = Values(weights, named), {}
    for name, tensor in named.items():
        if id(tensor) not in distinct:
            distinct[id(tensor)] = values[name] if id(tensor) in read else tensor.detach()
    return {name: distinct[id(tensor)] for name, tensor in named.items()}
