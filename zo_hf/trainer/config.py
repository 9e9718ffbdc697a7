"""`ZOConfig`: Trainer's arguments and every option of zeroth-order training, validated together."""

# Annotations are not postponed, because HfArgumentParser reads the types of the fields. Of several types it takes the first
# after None.
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments

from zo_hf.case import Case
from zo_hf.compatibility import auto_direction, check, rows_per_direction
from zo_hf.method_info import option
from zo_hf.parallel.lost_ranks import set_timeout
from zo_hf.serving.client import Server
from zo_hf.settings import Settings
from zo_hf.trainer.argument_values import check_arguments

_OF_SETTINGS = {setting.name: setting for setting in fields(Settings)}
_AUTO = "auto"
#: Distance of a probe that servers evaluate: at that of other LoRA adapters, 1e-2, a server in bfloat16 rounds most of c away
#: (docs/guides/serving.md).
SERVED_EPS = 1e-1


def _setting(name: str, **default: Any) -> Any:
    """Make an option from a field of `Settings`, with its help, and with its default unless another is given."""
    setting = _OF_SETTINGS[name]
    return field(default=default.get("default", setting.default), metadata={"help": setting.metadata["help"]})


@dataclass
class ZOConfig(Seq2SeqTrainingArguments):
    """Arguments of `ZOTrainer`: those of `transformers.TrainingArguments`, with the defaults below, and the `zo_*` options.

    The arguments of `Seq2SeqTrainingArguments`, such as `predict_with_generate`, are for `ZOSeq2SeqTrainer`. ZOTrainer does
    not write to its arguments. The learning rate and the number of steps that a training resolves are kept elsewhere.

    Raises:
        ValueError: an option cannot work forward-only; the message names it and the option to use instead.
    """

    # Trainer's arguments with other defaults.
    learning_rate: None | str | float = option(  # noqa: RUF036
        None,
        "The initial learning rate. auto finds one before training, with at most a twentieth of the run's forward "
        "passes (see zo-hf find-lr). In every subspace, the weights move by learning_rate times the projected "
        "gradient c times the direction z, as in MeZO. ZOConfig's default is 1e-5 for weights, 1e-3 for norms and "
        "scales, 3e-4 for LoRA, 1e-4 for other adapters, and 1e-2 for prefixes and prompts and for full along "
        "coordinates (zo_estimator=coordinate). For fzoo, it is multiplied by zo_eps. The best value depends on the "
        "model. MeZO uses 1e-7 to 1e-6 for all weights of large models, 5e-5 to 1e-4 for LoRA and 1e-3 to 1e-2 for "
        "prefixes.",
    )
    lr_scheduler_type: str = option(
        "constant", "The schedule of the learning rate. MeZO's schedule is constant. Every schedule of Trainer works."
    )
    optim: str = option(
        "sgd",
        "The optimizer of the coordinates: sgd (set momentum with optim_args='momentum=0.9'), adamw_torch, "
        "adafactor, or any other optimizer of Trainer that needs only gradients.",
    )
    max_grad_norm: float = option(
        0.0,
        "Maximum norm of the estimated gradient; 0 does not clip. The norm of a zeroth-order estimate is about |c| x "
        "sqrt(number of coordinates), far above the norm of a true gradient. Trainer's default of 1 would clip every "
        "step.",
    )

    # The method: fields of `Settings`.
    zo_subspace: str = _setting("subspace")
    zo_rank: None | int = _setting("rank")  # noqa: RUF036
    zo_fold_steps: None | int = _setting("fold_steps")  # noqa: RUF036
    zo_basis: str = _setting("basis")
    zo_preconditioner: str = _setting("preconditioner")
    zo_fold_rounding: str = _setting("fold_rounding")
    zo_eps: None | str | float = _setting("eps", default=_AUTO)  # noqa: RUF036
    zo_estimator: str = _setting("estimator")
    zo_num_directions: int = _setting("num_directions")
    zo_rows_per_direction: None | str | int = _setting("rows_per_direction", default=_AUTO)  # noqa: RUF036
    zo_noise_scale_steps: int = _setting("noise_scale_steps")
    zo_direction: str = _setting("direction", default=_AUTO)
    zo_active_layers: None | float = _setting("active_layers")  # noqa: RUF036
    zo_coordinate_order: str = _setting("coordinate_order")
    zo_rule: str = _setting("rule")
    zo_momentum: float = _setting("momentum")
    zo_momentum_at_fold: str = _setting("momentum_at_fold")
    zo_spectral_rank: None | int = _setting("spectral_rank")  # noqa: RUF036
    zo_curvature_rate: float = _setting("curvature_rate")
    zo_cocd_decay: float = _setting("cocd_decay")
    zo_cocd_memory: None | int = _setting("cocd_memory")  # noqa: RUF036
    zo_svrg_batches: int = _setting("svrg_batches")
    zo_svrg_steps: int = _setting("svrg_steps")
    zo_dp_noise_multiplier: None | float = _setting("dp_noise_multiplier")  # noqa: RUF036
    zo_dp_max_c: None | float = _setting("dp_max_c")  # noqa: RUF036
    zo_max_projected_grad: None | float = _setting("max_projected_grad")  # noqa: RUF036
    zo_normalize: bool = _setting("normalize")
    zo_batched_probes: Literal["auto", True, False] = _setting("batched_probes")
    zo_cuda_graph: bool = _setting("cuda_graph")
    zo_common_random_numbers: bool = _setting("common_random_numbers")
    zo_kernels: str = _setting("kernels")
    zo_target_modules: None | str | list[str] = _setting("target_modules")  # noqa: RUF009, RUF036
    zo_exclude_modules: None | str | list[str] = _setting("exclude_modules")  # noqa: RUF009, RUF036

    # Privacy.
    zo_dp_delta: None | float = option(  # noqa: RUF036
        None,
        "The delta for which zo/dp_epsilon is computed, in private training. Default: the largest power of ten below "
        "1/n, for n rows of train_dataset.",
    )
    zo_dp_target_epsilon: None | float = option(  # noqa: RUF036
        None,
        "Largest epsilon of private training; a step that would exceed it does not begin. Default: no limit.",
    )

    # Budgets.
    zo_max_forward_passes: None | int = option(  # noqa: RUF036
        None,
        "Maximum number of forward passes of the run; a step that would exceed it does not begin. Without max_steps, it "
        "sets the number of steps and the end of the learning rate's schedule, and num_train_epochs has no effect. "
        "Default: no limit.",
    )
    zo_max_time: None | float = option(  # noqa: RUF036
        None,
        "Maximum time of training in seconds, including evaluations, checkpoints and the time before a resume. Training "
        "ends after the step in which the time is up. max_steps or num_train_epochs still apply. Default: no limit.",
    )

    # Memory for time.
    zo_feature_cache_gib: float = option(
        0.0,
        "CPU memory, in GiB, for activations in front of the first layer that moves; 0 keeps nothing. These "
        "activations never change, so they are computed once for every row of the data. A forward pass then costs "
        "only the layers from the first moving one on. It needs zo_target_modules or an adapter in the last layers, "
        "and a transformers model with one stack of layers. Once the memory is used up, the activations of further "
        "rows are computed again in every step. zo/layers_run logs the fraction of the layers that forward passes "
        "ran.",
    )

    # Checkpoints.
    save_only_trajectory: bool = option(
        False,
        "Write checkpoints that hold only the log of the steps so far, usually a few kilobytes. Resuming repeats "
        "these steps from the model that the run began with. save_model still writes the whole model.",
    )

    # Several processes.
    zo_parallel: str = option(
        "data",
        "The work that several processes divide among them: data, directions, both or pipeline. With data, each "
        "process has its own rows. With directions, each process has its own directions and all have the same rows. "
        "With both, the processes form a grid. With pipeline, each process has its own layers, for a model that does "
        "not fit on one device.",
    )
    zo_pipeline_stages: None | str | int = option(  # noqa: RUF036
        _AUTO,
        "Number of processes that divide the model's layers among them. auto stands for all processes with "
        "zo_parallel=pipeline, and otherwise for 1. With a smaller number there are several pipelines, which divide rows or "
        "directions as zo_parallel says (pipeline: rows).",
    )
    zo_check_steps: int = option(
        100,
        "Number of steps between comparisons of the weights' checksums on all processes; 0 never compares weights. "
        "Each comparison covers a part of the weights. All weights are compared before the first step, before every "
        "checkpoint, and at the end.",
    )

    # Servers that evaluate the model.
    server_url: None | str | list[str] = option(  # noqa: RUF009, RUF036
        None,
        "Address of an OpenAI-compatible server with run-time LoRA adapters, such as vLLM, that evaluates the model "
        "in place of this process. Give several servers as a list, or separated by commas. It needs a model with a "
        "LoRA adapter. Default: none.",
    )
    server_max_loras: int = option(
        8,
        "Number of adapters that each server holds at a time: its --max-loras. A step with more adapters takes "
        "several turns.",
    )
    server_folder: None | str = option(  # noqa: RUF036
        None,
        "Folder for adapters that this machine and the servers share. Default: a folder in /dev/shm that only this "
        "user can read.",
    )
    server_timeout: float = option(
        600.0, "Maximum time in seconds to wait for one answer, or for a server that has stopped to come back."
    )

    # Stability.
    zo_stability_steps: int = option(
        0,
        "Number of steps between measurements of the curvature; 0 never measures. The curvature gives the largest "
        "learning rate at which the run is stable. The log has zo/hessian_trace (and _error), zo/lambda_max, "
        "zo/critical_lr_lower, zo/critical_lr_upper and zo/stability_ratio, the learning rate divided by "
        "zo/critical_lr_upper. A measurement costs one forward pass, or three with AdamW. It needs zo_estimator "
        "two_point, one_sided or second_difference, and optim sgd or adamw_torch.",
    )
    zo_stability_action: str = option(
        "warn",
        "The reaction when zo/stability_ratio exceeds 1: warn or cap. From then on, cap keeps the learning rate at "
        "or below 0.8 times zo/critical_lr_lower.",
    )

    def __post_init__(self) -> None:
        self.learning_rate = number_or_auto("learning_rate", self.learning_rate)
        if isinstance(self.zo_pipeline_stages, str) and self.zo_pipeline_stages.isdecimal():  # from the command line
            self.zo_pipeline_stages = int(self.zo_pipeline_stages)
        self.zo_pipeline_stages = _AUTO if self.zo_pipeline_stages is None else self.zo_pipeline_stages
        self.zo_eps = number_or_auto("zo_eps", _AUTO if self.zo_eps is None else self.zo_eps)
        check_arguments(self)
        settings = self.settings()
        settings.make_estimator(1.0)  # raises if the estimator needs more directions
        for name in _OF_SETTINGS:
            if name != "seed" and not isinstance(getattr(self, f"zo_{name}"), str):
                setattr(self, f"zo_{name}", getattr(settings, name))  # Python's own numbers, which JSON can hold
        check(Case(settings, vars(self)))
        for url in addresses(self.server_url):
            Server(url, self.server_timeout)  # raises if it is no address
        super().__post_init__()
        set_timeout(self.ddp_timeout)

    def settings(self) -> Settings:
        """The method that these arguments describe.

        Raises:
            ValueError: a value is unknown or out of range; a hyperparameter search may have set it after validation.
        """
        values = {name: getattr(self, f"zo_{name}") for name in _OF_SETTINGS if name != "seed"}
        eps = number_or_auto("zo_eps", values["eps"])
        if eps in (None, _AUTO):
            eps = None if self.server_url is None else SERVED_EPS
        rows = values["rows_per_direction"]
        if isinstance(rows, str) and rows.isdecimal():  # from the command line
            values["rows_per_direction"] = int(rows)
        is_auto = isinstance(self.zo_direction, str) and self.zo_direction == _AUTO
        if is_auto:
            values["direction"] = _OF_SETTINGS["direction"].default
        settings = Settings(**values | {"eps": eps, "seed": self.seed})
        case = Case(settings, vars(self))
        if settings.rows_per_direction == _AUTO and not rows_per_direction(case):
            return replace(settings, rows_per_direction=0)
        return replace(settings, direction=auto_direction(case)) if is_auto else settings


def addresses(server_url: str | list[str] | None) -> list[str]:
    """Return the addresses that `server_url` names: none, or at least one.

    Raises:
        ValueError: the list is empty, or has an address twice.
    """
    if server_url is None:
        return []
    given = server_url.split(",") if isinstance(server_url, str) else server_url
    found = [url.strip() for url in given if url.strip()]
    if not found:
        raise ValueError(f"server_url={server_url!r} names no server; leave it out, or give an address.")
    if len({url.rstrip("/") for url in found}) < len(found):
        raise ValueError(f"server_url={server_url!r} names a server twice; give each address once.")
    return found


def number_or_auto(name: str, value: Any) -> Any:
    """Turn an argument that may be a string, as on the command line, into a number, "auto" or None.

    Raises:
        ValueError: the string is neither a number nor "auto".
    """
    if not isinstance(value, str) or value == _AUTO:
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} is not a number; give one, or 'auto'.") from None
