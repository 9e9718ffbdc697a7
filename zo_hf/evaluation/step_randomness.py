"""The random numbers of a step's forward passes: its directions, and those that a loss draws by itself."""

from __future__ import annotations

from dataclasses import dataclass

from zo_hf.directions import Distribution
from zo_hf.rng import StreamOf
from zo_hf.rng.global_generators import GlobalGenerators


@dataclass(frozen=True)
class StepRandomness:
    """The random numbers of a step, the same at all of its probes.

    Args:
        stream_of: the stream of each direction of the step.
        distribution: the distribution of the directions.
        generators: the state of the global generators at which every evaluation begins; None leaves them alone.
    """

    stream_of: StreamOf
    distribution: Distribution
    generators: GlobalGenerators | None

    @property
    def of_directions(self) -> tuple[StreamOf, Distribution]:
        """The arguments by which a subspace draws directions, see `Subspace.at`."""
        return self.stream_of, self.distribution

    def restore(self) -> None:
        """Let an evaluation begin at the same state of the global generators as all others."""
        if self.generators is not None:
            self.generators.restore()
