"""The base model of a log: of the class, the dtype and the quantization with which the run began."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from zo_hf.trajectory.adapter import with_run_adapter
from zo_hf.trajectory.log import Trajectory, TrajectoryError
from zo_hf.untrusted.fields import shown
from zo_hf.untrusted.quantization_config import loadable

DTYPES = ("float16", "bfloat16", "float32", "float64")


def load_base(name: str, trajectory: Trajectory, revision: str | None = None) -> Any:
    """Load the base model with the run's class and dtype, and wrap it with the run's adapter if it had one.

    Raises:
        TrajectoryError: transformers does not have the class, or torch the dtype.
    """
    base = trajectory.header["base"]
    kind: Any = getattr(transformers, str(base.get("class")).removeprefix("FSDP"), None)
    is_model = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model or kind.config_class is None:
        raise TrajectoryError(
            f"{trajectory.path} was recorded from a {shown(base.get('class'))}, which transformers does not have; replay "
            "it in Python with zo_hf.trajectory.replay(model, path)."
        )
    if base.get("dtype") not in DTYPES:
        raise TrajectoryError(
            f"{trajectory.path} names no dtype that a model trains in, so zo_hf did not write it; use another copy of it."
        )
    dtype: torch.dtype = getattr(torch, base["dtype"])
    try:
        quantization = loadable(base.get("quantization"))
    except ValueError as error:
        raise TrajectoryError(
            f"{trajectory.path} describes no base model, because {error}; use another copy of it."
        ) from error
    # A commit only: the name of a branch may mean other weights tomorrow.
    is_commit = bool(re.fullmatch(r"[0-9a-f]{40}", base.get("revision") or ""))
    if revision is None and is_commit and not Path(name).exists() and name == base.get("name"):
        revision = base["revision"]
    more: dict[str, Any] = {} if revision is None else {"revision": revision}
    if quantization is not None:
        more["quantization_config"] = quantization
    if base.get("quantization") is not None:
        on_cuda = base.get("device") == "cuda" and torch.cuda.is_available()
        more["device_map"] = "cuda" if on_cuda else "cpu"
    model = kind.from_pretrained(name, dtype=dtype, **more)
    if base.get("device") == "cuda" and torch.cuda.is_available():  # the same kind of device gives the run's bits
        model.to("cuda")
    return model if trajectory.header.get("start") is None else with_run_adapter(model, trajectory)
