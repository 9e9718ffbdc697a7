"""Points of a run as LoRA adapters in PEFT's format, which a server loads from a folder."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import is_peft_available

from zo_hf.subspaces.adapter_config import FILE
from zo_hf.subspaces.peft_methods import active_adapter

if TYPE_CHECKING:
    from peft import PeftModel

_FACTORS = ("lora_A", "lora_B")
#: Options of PEFT's LoRA that change what the adapter computes, and that a server passes over or refuses.
_UNSERVED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
)


def check_servable(model: nn.Module) -> None:
    """Refuse a model that a server cannot evaluate with LoRA adapters of linear layers.

    Raises:
        ValueError: it is such a model; the message says which it takes.
    """
    way_out = "wrap the model by peft.get_peft_model with a LoraConfig of linear layers"
    if is_peft_available():
        from peft import LoraConfig, PeftModel
    if not is_peft_available() or not isinstance(model, PeftModel):
        raise ValueError(
            f"server_url=... moves LoRA adapters, and {type(model).__name__} is not a PEFT model; {way_out}."
        )
    config: Any = model.active_peft_config
    if not isinstance(config, LoraConfig) or len(model.active_adapters) > 1:
        kind = "several adapters" if isinstance(config, LoraConfig) else f"an adapter of {type(config).__name__}"
        raise ValueError(f"server_url=... moves one LoRA adapter, and the model has {kind}; {way_out}.")
    for name in _UNSERVED:
        if getattr(config, name, None):
            raise ValueError(f"{name} of LoraConfig does not work with server_url=...; leave it out.")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    others = [name for name in names if not _is_factor(name, active_adapter(model))]
    if others:
        raise ValueError(f"{others[0]} is trainable, which no LoRA adapter of a server holds; {way_out}.")


class AdapterFiles:
    """Writes the adapter of a model, or what a probe makes of it.

    The files are in a folder of their own, which is removed with this object.

    Args:
        model: a PEFT model that `check_servable` accepts.
        parent: the folder in which to make it, which the servers can read; None takes /dev/shm or the folder of temporary
            files, in which only this user can read it.

    Attributes:
        rank: r of the adapter.

    Raises:
        ValueError: `parent` is no folder that can be written to.
    """

    def __init__(self, model: PeftModel, parent: str | None) -> None:
        self._model, self._adapter, self._count = model, str(active_adapter(model)), 0
        config: Any = copy.deepcopy(model.active_peft_config)
        config.inference_mode, self.rank = True, int(config.r)
        try:
            self._holder = tempfile.TemporaryDirectory(
                prefix="zo_hf-", dir=_default_parent() if parent is None else parent, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise ValueError(
                f"server_folder={parent!r} cannot be written to ({error.strerror}); name a folder that this machine and the "
                "servers share."
            ) from error
        self.folder = Path(self._holder.name).absolute()
        if parent is not None:
            self.folder.chmod(0o755)
        config.save_pretrained(str(self.folder))
        self._config = (self.folder / FILE).read_bytes()
        (self.folder / FILE).unlink()

    def write(self, moved: Mapping[str, Tensor]) -> Path:
        """Write the adapter to a new folder.

        Args:
            moved: values in place of the model's, by the names of its parameters.

        Returns:
            The folder; no other call returns the same.
        """
        from peft.utils import SAFETENSORS_WEIGHTS_NAME

        tensors = {}
        for name, parameter in self._model.named_parameters():
            if _is_factor(name, self._adapter):
                value = moved.get(name, parameter).detach()
                # A copy, because the file's format takes no views of one tensor.
                tensors[name.replace(f".{self._adapter}.", ".")] = value.to(
                    "cpu", torch.float32, copy=True
                ).contiguous()
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        (folder / FILE).write_bytes(self._config)
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        return folder

    def close(self) -> None:
        """Remove the files."""
        self._holder.cleanup()


def _default_parent() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _is_factor(name: str, adapter: str | None) -> bool:
    parts = name.split(".")
    return len(parts) > 3 and parts[-3] in _FACTORS and parts[-2] == adapter and parts[-1] == "weight"
