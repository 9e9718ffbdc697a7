"""Options of subspaces; `ZOConfig` has the same with `zo_` in front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_hf.method_info import Choice, Name, Options, Pattern, Whole, option
from zo_hf.subspaces.activation_basis import BASES
from zo_hf.subspaces.code_rounding import ROUNDINGS
from zo_hf.subspaces.input_scales import PRECONDITIONERS


@dataclass(frozen=True)
class SubspaceOptions(Options):
    """Options of the subspaces; see the help of each.

    Raises:
        ValueError: a value is out of range; the message names the option.
    """

    subspace: str = option(
        "auto",
        "The tensors that move: low_rank, core, full, adapter, norms, scales or auto. low_rank moves float32 factors "
        "of every matrix, and every 1-D parameter. core moves r x r numbers of every matrix (SubZero). full moves "
        "all weights (MeZO's algorithm). adapter moves the trainable weights of a PEFT model. norms moves the 1-D "
        "parameters. scales moves the scales of quantized layers (QZO). auto chooses adapter for a PEFT model, and "
        "low_rank otherwise.",
        Name(),
        "use 'auto' for the subspace that suits the model",
    )
    rank: int | None = option(
        None,
        "Rank r of the low-rank factors, or of the core. Default: 4; 32 for the core.",
        Whole(1, also=(None,)),
        "4 is a good start",
    )
    fold_steps: int | None = option(
        None,
        "Number of steps between folds. A fold adds the low-rank factors, or the core, to the weights and draws new "
        "bases; 0 never folds. Default: 50, but 0 for a quantized model, whose training then ends with a LoRA "
        "adapter. Folds of a quantized model rewrite its 8-bit and 4-bit weights (see zo_fold_rounding). Checkpoints "
        "are smallest if save_steps is a multiple of zo_fold_steps.",
        Whole(0, also=(None,)),
        "use 0 to never fold",
    )
    basis: str = option(
        "random",
        "The source of V, the low-rank factor that is fixed between folds. random draws it from the seed. activation "
        "computes it from the inputs of linear layers when the model reads random tokens (AGZO), which takes one "
        "forward pass of 128 tokens per fold. For zo_subspace low_rank.",
        Choice(BASES),
        "'random' needs no forward pass",
    )
    preconditioner: str = option(
        "none",
        "The scaling of directions: none or inputs. inputs divides each coordinate of a direction by the size of its "
        "input in linear layers and norms (the diagonal of K-FAC's input factor). The sizes are measured in one "
        "forward pass of 128 random tokens per fold. For zo_subspace low_rank and norms.",
        Choice(PRECONDITIONERS),
        "'none' needs no forward pass",
    )
    fold_rounding: str = option(
        "stochastic",
        "The rounding of folds into 8-bit and 4-bit weights: stochastic or gptq. stochastic keeps the expectation of "
        "every weight. gptq corrects the rounding errors of a layer's weights with its other weights, given the "
        "layer's inputs. The inputs come from 512 tokens per fold: text that a causal model generates itself, or "
        "random tokens for other models. For zo_subspace low_rank and core.",
        Choice(ROUNDINGS),
        "'stochastic' needs no text",
    )
    target_modules: str | Sequence[str] | None = option(
        None,
        "The parameters that move: a regular expression that matches the whole name of a parameter or module, or a "
        "list of name endings. Default: all trainable parameters, except that only B moves in a LoRA adapter that "
        "begins at zero.",
        Pattern(also=(None,)),
        "leave it out to move all trainable parameters",
    )
    exclude_modules: str | Sequence[str] | None = option(
        None,
        "The parameters that do not move, in the form of zo_target_modules.",
        Pattern(also=(None,)),
        "leave it out to exclude nothing",
    )
