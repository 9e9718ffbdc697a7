"""What every distribution of directions is: how z is drawn over all coordinates, over a slice of one, and over rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from zo_hf.directions.stream import Stream
from zo_hf.method import Method

if TYPE_CHECKING:
    from zo_hf.directions.draw import NoiseLayout
    from zo_hf.subspaces.subspace import Subspace


@dataclass(frozen=True)
class Run:
    """What a distribution may have to know of the run that it draws for.

    Args:
        subspace: whose coordinates move.
        num_directions: q, directions of a step.
        active_layers: fraction of the layers that move in a step, where not all do; None takes the distribution's own.
    """

    subspace: Subspace
    num_directions: int = 1
    active_layers: float | None = None


class Distribution:
    """Draws the directions of a run; the same z however it is asked for: whole, by slices or by rows.

    z depends on the stream, the coordinates' names and, where `reads_weights`, on their values; never on their order.

    Args:
        run: what it draws for.

    Raises:
        ValueError: it cannot draw for this run; the message names the option and what to use instead.
    """

    #: The name used in options.
    name: ClassVar[str]
    about: ClassVar[Method]
    #: Whether z depends on the values of the coordinates at the beginning of the step.
    reads_weights: ClassVar[bool] = False

    def __init__(self, run: Run) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        """To be called before each step; before the first one, the coordinates are those that the run starts from."""

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        """z over all tensors of a layout, float32 of shape (layout.size,); what lies between tensors means nothing.

        Args:
            coordinates: those tensors as they are now, by name.
        """
        raise NotImplementedError

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        """z over elements start.. of tensor `name`, float32 of shape (len(values),), which the caller may write to.

        Args:
            values: those elements as they were at the beginning of the step, (n,); z is drawn on their device.
        """
        raise NotImplementedError

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        """z over chosen rows of a matrix, float32 of shape (*rows.shape, values.shape[1]).

        Args:
            rows: row numbers, int64 of any shape; they may repeat.
            values: the whole matrix.
        """
        raise NotImplementedError

    def moves(self, stream: Stream, name: str) -> bool:
        """Whether z is anything but zero on tensor `name`; the same for all directions of a step."""
        return True

    def moving(self, stream: Stream, dimension: int) -> float:
        """E‖z‖²: of `dimension` coordinates, about how many move."""
        return dimension

    def observe(self, stream: Stream, projected_gradients: Sequence[float]) -> None:
        """To be told what a step found along its directions, in training and in a replay; of a skipped step nothing.

        Args:
            stream: of any direction of that step.
            projected_gradients: c of every direction, neither clipped nor normalised.
        """

    def state(self) -> dict[str, float]:
        """Plain numbers that later directions depend on, by name; a checkpoint holds them."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Continue from what `state` returned."""
