"""Options of private training; `ZOConfig` has the same with `zo_` in front."""

from __future__ import annotations

from dataclasses import dataclass

from zo_hf.method_info import Options, Real, option

#: More noise than any run can learn through; its sums still fit into 64 bits.
MOST_NOISE = 1000.0


@dataclass(frozen=True)
class PrivacyOptions(Options):
    """Options of differentially private training; see the help of each.

    Raises:
        ValueError: a value is out of range; the message names the option.
    """

    dp_noise_multiplier: float | None = option(
        None,
        "Standard deviation of the noise of differentially private training, in units of zo_dp_max_c. Every step "
        "then draws its rows by Poisson sampling, clips the projected gradient c of every row, and adds noise to the "
        "sum. zo/dp_epsilon logs how much the run has revealed of any one row. 0 clips without noise, which is not "
        "private. Default: training is not private.",
        Real(0, MOST_NOISE, also=(None,)),
        "1 is a common start",
    )
    dp_max_c: float | None = option(
        None,
        "Maximum of |c| of a row in private training, in loss per unit along z; larger values are clipped to it. "
        "With several directions, it bounds the norm of the row's numbers c. Choose it from public data, or "
        "independently of the data: one to four times the median norm of a row's gradient.",
        Real(0, above=True, also=(None,)),
        "use the usual size of a row's c",
    )
