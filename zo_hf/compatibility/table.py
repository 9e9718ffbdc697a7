"""One table of options that do not combine, with the reason and the way out.

`ZOConfig`, the engine and the trainer check a run against this table, each with the facts that it knows. `ZOConfig` knows
the options, and the trainer also the model and the optimizer. A requirement of one part alone, such as a range, is checked
by that part itself.
"""

from __future__ import annotations

from zo_hf.case import Case
from zo_hf.compatibility.arguments import ARGUMENTS
from zo_hf.compatibility.conflict import Conflict
from zo_hf.compatibility.graphs import GRAPHS
from zo_hf.compatibility.methods import METHODS
from zo_hf.compatibility.models import MODELS
from zo_hf.compatibility.offloaded import OFFLOADED
from zo_hf.compatibility.pipelined import PIPELINED
from zo_hf.compatibility.preconditioned import PRECONDITIONED
from zo_hf.compatibility.private import PRIVATE
from zo_hf.compatibility.served import SERVED

#: In the order in which a run is checked.
CONFLICTS: tuple[Conflict, ...] = (
    *METHODS,
    *ARGUMENTS,
    *MODELS,
    *OFFLOADED,
    *PRIVATE,
    *GRAPHS,
    *PIPELINED,
    *PRECONDITIONED,
    *SERVED,
)


def check(case: Case) -> None:
    """Refuse a run that has a conflict of the table.

    Raises:
        ValueError: the run has a conflict; the message names both sides, the reason and the way out.
    """
    for conflict in CONFLICTS:
        if conflict.applies(case):
            raise ValueError(conflict.message(case))
