"""Parameters that an evaluation of a loss writes, which is refused: every probe would write them again, from other values.

The version of a tensor shows a write in place after the evaluation. It is read for the parameters that move, and for all others that
code of the user's own may write, such as those of a target network that follows the model. In the steps in which `HeldParameters`
searches a loss, it refuses a write of a parameter that moves at once.

A loss may load other weights into a model of the user's own, and its own ones again. The first evaluation shows by checksums whether it
does, and every later one is then compared in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from zo_hf.evaluation.own_modules import own_parameters
from zo_hf.offload import is_offloaded
from zo_hf.parallel.checksum import tensor_checksum
from zo_hf.parallel.shards import is_sharded, local_part
from zo_hf.subspaces.held_parameters import writes_of
from zo_hf.subspaces.subspace import Subspace


class WrittenParameters:
    """The parameters of a subspace's model, whose versions show that they are written.

    Args:
        subspace: the subspace.
    """

    def __init__(self, subspace: Subspace) -> None:
        self._model = subspace.model
        # Loading a block writes the parameters of an offloaded model.
        self._own = {} if is_offloaded(self._model) else own_parameters(self._model)
        moved = {site.name: site.parameter for site in subspace.sites if site.offloaded is None}
        # Inference tensors have no version, and FSDP works on the parameters themselves.
        versioned = {name: p for name, p in moved.items() if not (is_sharded(p) or p.is_inference())}
        self._of_probe: Mapping[str, nn.Parameter] = versioned | self._own
        self._has_run = False
        self._loads_again = False

    @contextmanager
    def refused(self, is_probe: bool, runs: bool) -> Iterator[None]:
        """Refuse the writes of an evaluation in this context.

        Args:
            is_probe: True for an evaluation that a step needs; a metric may load other values of the parameters that move.
            runs: True if the model surely runs in the context, which then shows what its forward writes.

        Raises:
            ValueError: a parameter has been written, and has other values than before; the message names it.
        """
        parameters = self._of_probe if is_probe else self._own
        versions = [p._version for p in parameters.values()]
        are_compared = self._loads_again or not self._has_run
        sums = {name: _sum_of(p) for name, p in self._own.items()} if are_compared else {}
        yield
        self._has_run = self._has_run or runs
        for (name, parameter), version in zip(parameters.items(), versions, strict=True):
            if parameter._version == version:
                continue
            if name not in sums or _sum_of(parameter) != sums[name]:
                raise ValueError(self._refusal(name, parameter))
            self._loads_again = True

    def _refusal(self, name: str, parameter: nn.Parameter) -> str:
        for module_name, module in self._model.named_modules():
            is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight is parameter
            if is_embedding and module.max_norm is not None:
                return (
                    f"the embedding {module_name} has max_norm and writes {name} in its forward, and a probe must leave the "
                    "weights as they are; set its max_norm=None."
                )
        return writes_of(name)


def _sum_of(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_meta else tensor_checksum(local_part(parameter)[0])
