"""The modules that read a parameter in their forward: its own module, or in adapters often one around it.

A ParameterDict has no forward; the layer around it reads its entries. Most layers of PEFT also read the weights of
their child modules directly. For example, DoRA takes the product of lora_A and lora_B. A subspace therefore enters the
whole layer, which then finds the moved tensors wherever it looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.utils import is_peft_available


class ParameterReaders:
    """Finds the modules of a model that a subspace must enter for a parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._parents: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._parents.setdefault(child, []).append((parent, name))
        self._readers = _layers_that_read_inside(model)

    def of(self, module: nn.Module, attribute: str) -> list[tuple[nn.Module, str]]:
        """Return the modules that read `module.attribute` in their forward, each with the dotted path to it."""
        found: dict[tuple[nn.Module, str], bool] = {}
        for chain in self._chains(module, attribute):
            readers = [link for link in chain if link[0] in self._readers]
            # Take the outermost reader: a subspace must not enter a module inside of another one.
            callers = [readers[-1]] if readers else [link for link in chain if _has_forward(link[0])]
            found.setdefault((callers or chain)[0], bool(readers))
        if not _has_forward(module) and any(found.values()):
            # If several layers share a ParameterDict, the model around them may have it too, but does not read it.
            return [link for link, is_reader in found.items() if is_reader]
        return list(found)

    def _chains(self, module: nn.Module, path: str) -> Iterator[list[tuple[nn.Module, str]]]:
        """Yield every way from `module` up to the model: pairs (ancestor, path to the parameter), nearest first."""
        here = (module, path)
        parents = self._parents.get(module, [])
        if not parents:
            yield [here]
        for parent, name in parents:
            for chain in self._chains(parent, f"{name}.{path}"):
                yield [here, *chain]


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _layers_that_read_inside(model: nn.Module) -> set[nn.Module]:
    """Return the layers of PEFT, except those that use all of their weights through the forward of a child."""
    if not is_peft_available():
        return set()
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    def calls_children(layer: BaseTunerLayer) -> bool:
        if isinstance(layer, LNTuningLayer):
            return True
        # Variants, such as DoRA, and embeddings read weights. So do AdaLoRA's layers, a LoraLayer of another package.
        plain = isinstance(layer, LoraLayer) and type(layer).__module__.startswith("peft.tuners.lora.")
        return plain and not layer.lora_variant and not layer.lora_embedding_A

    return {m for m in model.modules() if isinstance(m, BaseTunerLayer) and not calls_children(m)}
