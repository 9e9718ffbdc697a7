"""Arguments, data and weights that every process of a run must have been started with alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from zo_hf.quantization import stored_tensors
from zo_hf.version import __version__

#: Arguments of one process alone: where it writes and reports, and how it fetches its rows.
MAY_DIFFER = frozenset(
    [
        "output_dir",
        "run_name",
        "project",
        "report_to",
        "disable_tqdm",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "local_rank",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        "save_on_each_node",
        "save_total_limit",
        "resume_from_checkpoint",
        "do_train",
        "do_eval",
        "do_predict",
        "skip_memory_metrics",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "torch_empty_cache_steps",
        "ddp_timeout",
    ]
)


def common_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that every process needs alike, and the versions of the code that draws directions."""
    values = {name: value for name, value in args.to_dict().items() if name not in MAY_DIFFER}
    return values | {"the version of zo_hf": __version__, "the version of torch": str(torch.__version__)}


def common_data(train_dataset: Any, eval_dataset: Any) -> dict[str, int]:
    """Return the number of rows of each data set that has a length."""
    named = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, Mapping):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        named["eval_dataset"] = eval_dataset
    return {
        f"the length of {name}": len(data) for name, data in named.items() if data is not None and has_length(data)
    }


def common_weights(model: nn.Module) -> dict[str, str]:
    """Return shape and dtype of every stored tensor, and whether it is trained, by name."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        f"the weight {name}": f"{tuple(tensor.shape)}, {tensor.dtype}{', trained' * (name in trained)}"
        for name, tensor in stored_tensors(model).items()
    }


def name_of_checkpoint(folder: str | bool | Path | None) -> str | None:
    """Return the last part of a checkpoint's path, since processes on other machines may see it at another place."""
    return Path(str(folder)).name if folder else None
