"""`ZOConfig`: Trainer's arguments and every option of zeroth-order training, validated together."""

# No postponed annotations here: HfArgumentParser reads the types of the fields, and takes the first after None where a
# field has several.
from dataclasses import dataclass, field, fields
from typing import Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from zo_hf.directions import DISTRIBUTIONS, ORDERS, Layers
from zo_hf.distributed import PARALLEL
from zo_hf.estimators import ESTIMATORS
from zo_hf.optimizers import RULES, CoherentCoordinateDescent, RuleOptions
from zo_hf.stability.monitor import check_action, check_stability
from zo_hf.subspaces import SUBSPACES
from zo_hf.together import check_direction

_NEEDS_BACKWARD = (
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
    OptimizerNames.GALORE_ADAMW,
    OptimizerNames.GALORE_ADAMW_8BIT,
    OptimizerNames.GALORE_ADAFACTOR,
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
)
_SCHEDULE_FREE = (
    OptimizerNames.SCHEDULE_FREE_ADAMW,
    OptimizerNames.SCHEDULE_FREE_RADAM,
    OptimizerNames.SCHEDULE_FREE_SGD,
)
# One option: newer versions of transformers call it by the first name and keep the second as an alias.
_CHECKPOINTING = tuple(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


@dataclass
class ZOConfig(Seq2SeqTrainingArguments):
    """Arguments of `ZOTrainer`: those of `transformers.TrainingArguments`, with the defaults below, and the `zo_*` ones.

    Those of `Seq2SeqTrainingArguments`, such as `predict_with_generate`, are for `ZOSeq2SeqTrainer`.

    Raises:
        ValueError: an option cannot work forward-only; the message names it and what to use instead.
    """

    learning_rate: None | str | float = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "The initial learning rate; auto finds one before training, from up to a twentieth of the run's forward passes "
            "(see zo-hf find-lr). Its meaning is MeZO's in every subspace: the weights move by "
            "learning_rate x c x z. Default: 1e-5 for weights, 1e-3 for norms and scales, 3e-4 for LoRA, 1e-4 for other adapters, 1e-2 for prefixes and "
            "prompts, and for full along coordinates (zo_estimator=coordinate). The best value depends on the model; MeZO's are 1e-7 to 1e-6 for all weights of large models, "
            "5e-5 to 1e-4 for LoRA and 1e-3 to 1e-2 for prefixes."
        },
    )
    lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "The learning rate schedule; constant as in MeZO. Any of Trainer's schedules works."},
    )
    optim: str = field(
        default="sgd",
        metadata={
            "help": "The optimizer of the coordinates: sgd (pass momentum through optim_args), adamw_torch, adafactor "
            "and any other that Trainer knows and that needs nothing but gradients."
        },
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "Maximum norm of the estimated gradient; 0 does not clip. The norm of a zeroth-order estimate is "
            "about |c| x sqrt(number of coordinates), far above a backward pass's, so Trainer's default of 1 would "
            "turn every step into a normalised one."
        },
    )
    zo_subspace: str = field(
        default="auto",
        metadata={
            "help": "Which tensors move: low_rank (float32 factors of every matrix, every 1-D parameter), core (r x r "
            "numbers of every matrix, SubZero), full (all weights, MeZO's algorithm), adapter (the trainable weights of a "
            "PEFT model), norms (parameters of one dimension), scales (those of quantised layers, QZO), or auto: adapter "
            "for a PEFT model, else low_rank."
        },
    )
    zo_rank: None | int = field(  # noqa: RUF036
        default=None, metadata={"help": "Rank r of the low-rank factors, or of the core. Default: 4; 32 for the core."}
    )
    zo_fold_steps: None | int = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "Steps after which the low-rank factors, or the core, are added to the weights and new bases are "
            "drawn; 0 never does. Default: 50, but 0 for a quantised model, whose training then ends with a LoRA adapter; "
            "a number there writes 8-bit and 4-bit weights anew, rounded stochastically. A checkpoint is smallest when "
            "save_steps is a multiple of it."
        },
    )
    zo_eps: None | str | float = field(  # noqa: RUF036
        default="auto",
        metadata={
            "help": "Distance of a probe along the direction; auto is MeZO's: 1e-3 for weights (low_rank, full, and PEFT's "
            "LN tuning and the like), 1e-2 for LoRA, DoRA, IA3 and other adapters, 1e-1 for prefixes and prompts."
        },
    )
    zo_estimator: str = field(
        default="two_point",
        metadata={
            "help": "How losses become projected gradients: two_point (central differences, 2q forward passes for "
            "q = zo_num_directions), one_sided (forward differences that share one clean loss, q + 1), fzoo (one_sided "
            "divided by the standard deviation of the losses, q + 1; the paper's zo_direction is rademacher; the learning "
            "rate is zo_eps times the length of a step, which the default takes into account), evolution (z-scores of the "
            "losses of antithetic pairs, 2q), evolution_ranks (their centred ranks, 2q; of both the learning rate is about "
            "the length of a step), forward_gradient (exact derivatives by forward-mode differentiation, each counted "
            "as two forward passes; needs attn_implementation='eager'), second_difference (two_point with the clean loss "
            "between them, 2q + 1, which gives the curvature along each direction), coordinate (central differences along zo_num_directions single "
            "coordinates, the next ones every step, 2q), or coordinate_forward (the same with one clean loss for all, q + 1)."
        },
    )
    zo_rule: str = field(
        default="none",
        metadata={
            "help": "What the estimate goes through before the optimizer named by optim gets it: none, sign (of c), "
            "conservative (the best of staying, stepping and stepping back, for three forward passes more, two beside a clean loss), curvature "
            "(HiZOO; needs zo_estimator=second_difference), muon (matrix sign, ZO-Muon), power_iteration (leading "
            "singular directions, ZO-MOPI), cocd (coherent coordinate descent: differences along coordinates are kept and "
            "reused; needs zo_estimator=coordinate or coordinate_forward, and optim=sgd), or svrg (variance reduction by differences "
            "from a snapshot, MeZO-SVRG; zo_fold_steps has to be a multiple of zo_svrg_batches + zo_svrg_steps). With muon and power_iteration the learning rate is the root mean square "
            "length of a step per coordinate, with sign it is √q times that."
        },
    )
    zo_momentum: float = field(
        default=0.0,
        metadata={
            "help": "For muon and power_iteration: weight of the past in the running mean of estimates whose singular "
            "directions are taken; 0 has none. Momentum of the optimizer itself goes through optim_args."
        },
    )
    zo_momentum_at_fold: str = field(
        default="carry",
        metadata={"help": "For muon and power_iteration: carry zo_momentum over a fold, or reset it to zero."},
    )
    zo_spectral_rank: None | int = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "For power_iteration: how many singular directions a matrix's step has. Default: half of all."
        },
    )
    zo_curvature_rate: float = field(
        default=1e-6,
        metadata={
            "help": "For curvature: weight of a step in the running mean of the curvature; the paper's are 1e-8 to 1e-6."
        },
    )
    zo_cocd_decay: float = field(
        default=0.99,
        metadata={
            "help": "What zo_rule=cocd multiplies its differences by every step, from 0 (forgets) to 1 (keeps)."
        },
    )
    zo_cocd_memory: None | int = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "How many differences zo_rule=cocd remembers, the freshest. Default: one for each coordinate."
        },
    )
    zo_svrg_batches: int = field(
        default=9,
        metadata={
            "help": "For svrg: steps in which the gradient at a new snapshot is estimated, each from its own batch; the last "
            "of them moves along it, and the others do not move."
        },
    )
    zo_svrg_steps: int = field(
        default=1,
        metadata={"help": "For svrg: steps after these that use the snapshot; 1 is the paper's (its q is 2)."},
    )
    zo_coordinate_order: str = field(
        default="cyclic",
        metadata={
            "help": "In which order zo_estimator=coordinate takes the coordinates: cyclic, or permuted by the seed."
        },
    )
    zo_direction: str = field(
        default="gaussian",
        metadata={
            "help": "What directions are drawn from: gaussian, rademacher, sphere (all of one length), orthogonal (the "
            "directions of a step to each other), sparse (small weights alone, Sparse-MeZO), layers (a few layers in "
            "each step, LeZO), or adaptive_layers (those whose steps have found most, more often; AdaLeZO)."
        },
    )
    zo_active_layers: None | float = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "With zo_direction layers and adaptive_layers, the fraction of the layers that move in a step. Default: 0.25."
        },
    )
    zo_num_directions: int = field(
        default=1, metadata={"help": "Directions per step (q); zo_estimator says what each costs."}
    )
    zo_max_projected_grad: None | float = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "Largest magnitude of c; what is beyond is clipped, 0 clips nothing. Default: 0; 100 for scales."
        },
    )
    zo_normalize: bool = field(
        default=False,
        metadata={
            "help": "Divide c by its running root mean square, which makes the learning rate the length of a step per "
            "coordinate whatever the scale of the loss."
        },
    )
    zo_batched_probes: Literal["auto", True, False] = field(
        default="auto",
        metadata={
            "help": "Evaluate all probes of a step in one batch: True, False, or auto, which does so if the first step "
            "gives the same losses both ways. Batched probes are faster and hold the activations of all of them."
        },
    )
    zo_target_modules: None | str | list[str] = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "Parameters that move: a regular expression that matches the whole name of a parameter or module, "
            "or a list of name endings. Default: all trainable ones, but of a LoRA that begins at zero only B."
        },
    )
    zo_exclude_modules: None | str | list[str] = field(  # noqa: RUF036
        default=None, metadata={"help": "Parameters that do not move, written as for zo_target_modules."}
    )
    save_only_trajectory: bool = field(
        default=False,
        metadata={
            "help": "Have checkpoints of kilobytes: the log of the steps so far, from which resume_from_checkpoint takes "
            "them again, given the model that the run began with. save_model still writes the whole model."
        },
    )

    zo_max_forward_passes: None | int = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "Forward passes that the run may spend; a step that would go beyond is not begun. If max_steps is not "
            "given, it follows from this, so that schedules of the learning rate end here, and num_train_epochs is not "
            "looked at. Default: no limit."
        },
    )
    zo_max_time: None | float = field(  # noqa: RUF036
        default=None,
        metadata={
            "help": "Seconds that training may take, evaluations, checkpoints and what was before a resume included; the "
            "step under way is finished. max_steps or num_train_epochs still apply. Default: no limit."
        },
    )

    zo_parallel: str = field(
        default="data",
        metadata={
            "help": "What several processes share out: data (each its own rows, the same directions), directions (the "
            "same rows, each its own directions), or both (a grid)."
        },
    )
    zo_check_steps: int = field(
        default=100,
        metadata={
            "help": "Steps after which several processes compare checksums of their weights, a part of them each time; "
            "0 never does."
        },
    )

    zo_stability_steps: int = field(
        default=0,
        metadata={
            "help": "Steps between measurements of the curvature, from which follows the largest learning rate at which the "
            "run is stable; logged as zo/hessian_trace (and _error), zo/lambda_max, zo/critical_lr_lower, zo/critical_lr_upper "
            "and zo/stability_ratio, the learning rate over the upper one. Each costs one forward pass, three with AdamW; 0 "
            "never measures. Needs zo_estimator two_point, one_sided or second_difference and optim sgd or adamw_torch."
        },
    )
    zo_stability_action: str = field(
        default="warn",
        metadata={
            "help": "What to do when zo/stability_ratio crosses 1: warn, or cap, which from then on lowers the learning rate "
            "to 0.8 times zo/critical_lr_lower wherever the schedule's is above that."
        },
    )

    def __post_init__(self) -> None:
        self.read_numbers()
        self._check_zo_options()
        self._check_trainer_options()
        super().__post_init__()

    def read_numbers(self) -> None:
        """Turn words into numbers: the command line, and a search for hyperparameters, hand over words where there may be one."""
        if self.zo_eps is None:
            self.zo_eps = "auto"
        if isinstance(self.learning_rate, str) and self.learning_rate != "auto":
            try:
                self.learning_rate = float(self.learning_rate)
            except ValueError:
                raise ValueError(
                    f"learning_rate={self.learning_rate!r} is not a number; give one, or 'auto'."
                ) from None
        if isinstance(self.zo_eps, str) and self.zo_eps != "auto":
            try:
                self.zo_eps = float(self.zo_eps)
            except ValueError:
                raise ValueError(f"zo_eps={self.zo_eps!r} is not a number; give one, or 'auto'.") from None

    def _check_zo_options(self) -> None:
        _choose("zo_subspace", self.zo_subspace, ["auto", *SUBSPACES])
        _choose("zo_estimator", self.zo_estimator, list(ESTIMATORS))
        _choose("zo_rule", self.zo_rule, list(RULES))
        estimator, subspace = self.zo_estimator, self.zo_subspace
        RULES[self.zo_rule].check(subspace, estimator, self.zo_num_directions, self.rule_options())
        _choose("zo_coordinate_order", self.zo_coordinate_order, list(ORDERS))
        along_coordinates = ESTIMATORS[self.zo_estimator].along_coordinates
        check_direction(self.zo_estimator, self.zo_direction)
        if self.zo_coordinate_order != "cyclic" and not along_coordinates:
            raise ValueError(
                f"zo_coordinate_order={self.zo_coordinate_order!r} has no effect on zo_estimator={self.zo_estimator!r}; leave "
                "it out, or use zo_estimator='coordinate'."
            )
        _choose("zo_direction", self.zo_direction, list(DISTRIBUTIONS))
        if self.zo_active_layers is not None and not issubclass(DISTRIBUTIONS[self.zo_direction], Layers):
            raise ValueError(
                f"zo_active_layers={self.zo_active_layers} has no effect on zo_direction={self.zo_direction!r}; leave it "
                "out, or use zo_direction='layers'."
            )
        if self.zo_active_layers is not None and not 0 < self.zo_active_layers <= 1:
            raise ValueError(
                f"zo_active_layers={self.zo_active_layers} must be above 0 and at most 1; 0.25 moves a quarter of them."
            )
        _choose("zo_parallel", self.zo_parallel, list(PARALLEL))
        _choose("zo_batched_probes", self.zo_batched_probes, ["auto", True, False])
        if self.zo_rank is not None and self.zo_rank < 1:
            raise ValueError(f"zo_rank={self.zo_rank} must be at least 1; 4 is a good start.")
        if self.zo_max_projected_grad is not None and not self.zo_max_projected_grad >= 0:
            raise ValueError(
                f"zo_max_projected_grad={self.zo_max_projected_grad} must not be negative; use 0 to clip nothing."
            )
        if self.zo_fold_steps is not None and self.zo_fold_steps < 0:
            raise ValueError(f"zo_fold_steps={self.zo_fold_steps} must not be negative; use 0 to never fold.")
        if self.zo_eps != "auto" and not 0 < float(self.zo_eps or 0) < float("inf"):
            raise ValueError(f"zo_eps={self.zo_eps} must be a positive number; use 'auto' for the subspace's default.")
        if self.zo_check_steps < 0:
            raise ValueError(f"zo_check_steps={self.zo_check_steps} must not be negative; use 0 to never check.")
        if self.zo_stability_steps:
            check_action(self.zo_stability_steps, self.zo_stability_action)
            check_stability(self.zo_estimator, self.zo_rule, self.zo_direction)
        elif self.zo_stability_action != "warn":
            raise ValueError(
                f"zo_stability_action={self.zo_stability_action!r} has no effect without measurements; set "
                "zo_stability_steps=10, or leave it out."
            )
        if self.zo_max_forward_passes is not None and self.zo_max_forward_passes < 1:
            raise ValueError(
                f"zo_max_forward_passes={self.zo_max_forward_passes} must be at least 1; leave it out for no limit."
            )
        if self.zo_max_time is not None and not self.zo_max_time > 0:
            raise ValueError(
                f"zo_max_time={self.zo_max_time} must be a positive number of seconds; leave it out for no limit."
            )
        if self.zo_num_directions < 1:
            raise ValueError(f"zo_num_directions={self.zo_num_directions} must be at least 1, which is a good start.")
        ESTIMATORS[self.zo_estimator](1.0, self.zo_num_directions)  # it may need more of them
        if ESTIMATORS[self.zo_estimator].needs_tangents and self.zo_batched_probes is True:
            raise ValueError(
                f"zo_batched_probes=True cannot evaluate zo_estimator={self.zo_estimator!r}, whose probes take a forward pass "
                "each; use 'auto' or False."
            )
        if self.save_only_trajectory:
            for option, reason in (
                ("save_only_model", "keeps what it leaves out"),
                ("load_best_model_at_end", "needs the weights of a checkpoint"),
                ("auto_find_batch_size", "needs the base weights again after a restart"),
            ):
                if getattr(self, option):
                    raise ValueError(f"save_only_trajectory=True and {option}=True, which {reason}; leave one out.")

    def rule_options(self) -> RuleOptions:
        """What is set about `zo_rule`."""
        return RuleOptions(**{option.name: getattr(self, f"zo_{option.name}") for option in fields(RuleOptions)})

    def _check_trainer_options(self) -> None:
        if self.max_grad_norm and RULES[self.zo_rule].candidates:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} would shorten the step that zo_rule={self.zo_rule!r} has chosen; use "
                "max_grad_norm=0."
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha adds noise in training mode only, and probes run in evaluation mode; leave it out."
            )
        if self.deepspeed:
            raise ValueError("deepspeed partitions gradients, of which there are none; leave it out.")
        for name in _CHECKPOINTING:
            if getattr(self, name):
                raise ValueError(f"{name} saves memory in a backward pass, of which there is none; leave it out.")
        if self.optim in _NEEDS_BACKWARD:
            raise ValueError(
                f"optim={str(self.optim)!r} hooks into the backward pass; use 'sgd' or 'adamw_torch': their state is "
                "small in a low-rank subspace."
            )
        if self.optim in _SCHEDULE_FREE:
            raise ValueError(
                f"optim={str(self.optim)!r} swaps parameters between training and evaluation; use 'sgd' or 'adamw_torch'."
            )
        if self.zo_rule == CoherentCoordinateDescent.name and self.optim != OptimizerNames.SGD:
            raise ValueError(
                f"optim={str(self.optim)!r} would average what zo_rule='cocd' already remembers; use optim='sgd', or "
                "zo_rule='none'."
            )
        holds_gradient = self.zo_subspace != "full" or ESTIMATORS[self.zo_estimator].along_coordinates
        if not holds_gradient and self.optim != OptimizerNames.SGD:
            raise ValueError(
                f"optim={str(self.optim)!r} needs gradients, which zo_subspace='full' never holds; use optim='sgd', or "
                "zo_subspace='low_rank'."
            )
        if not holds_gradient and self.optim_args:
            raise ValueError(
                f"optim_args={self.optim_args!r} has no effect on the seeded SGD of zo_subspace='full'; leave it out, or "
                "use zo_subspace='low_rank'."
            )


def _choose(option: str, value: object, choices: list) -> None:
    if value not in choices:
        raise ValueError(f"{option}={value!r} is unknown; choose one of {', '.join(map(str, choices))}.")
