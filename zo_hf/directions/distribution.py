"""The interface of all distributions of directions: drawing z over all coordinates, over a slice, or over rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from zo_hf.directions.options import DirectionOptions
from zo_hf.method_info import Method
from zo_hf.rng import NoiseLayout, Stream


@dataclass(frozen=True)
class DirectionContext:
    """Facts about a run that a distribution may need.

    Args:
        coordinates: the tensors that move, by name.
        layers: the layer of each coordinate, by the coordinate's name; see `layers_of`.
        num_directions: q, number of directions of a step.
        are_weights: True if the coordinates are the model's weights themselves, so that their sizes mean something.
        options: the options of directions, of which a distribution reads those that it names in `uses`.
    """

    coordinates: Mapping[str, nn.Parameter]
    layers: Mapping[str, str]
    num_directions: int = 1
    are_weights: bool = False
    options: DirectionOptions = field(default_factory=DirectionOptions)

    @property
    def dimension(self) -> int:
        """Number of coordinates."""
        return sum(coordinate.numel() for coordinate in self.coordinates.values())


class Distribution:
    """Draws the directions of a run. A caller gets the same z as a whole, by slices, or by rows.

    z depends on the stream and on the names of the coordinates, but not on their order. It depends on the values of
    the coordinates only if `reads_weights` is True.

    Args:
        context: facts about the run.

    Raises:
        ValueError: the distribution cannot draw for this run; the message names the option and the way out.
    """

    #: Name in options.
    name: ClassVar[str]
    #: Other names of it, such as the paper's.
    aliases: ClassVar[tuple[str, ...]] = ()
    #: Fields of `DirectionOptions` that the distribution reads.
    uses: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[Method]
    #: True if z depends on the values of the coordinates at the beginning of the step.
    reads_weights: ClassVar[bool] = False

    def __init__(self, context: DirectionContext) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        """Prepare for a step.

        The caller invokes it before each step, for the first time with the coordinates that the run starts from.
        """

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Draw z over all tensors of a layout, float32 of shape (layout.size,), with arbitrary numbers in the gaps.

        Args:
            stream: stream of the direction.
            layout: positions of the tensors in the flat vector.
            coordinates: current values of these tensors, by name.
        """
        raise NotImplementedError

    def draw_layouts(
        self, streams: Sequence[Stream], layout: NoiseLayout, coordinates: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """Draw the z of several streams as `draw_layout` does, each (layout.size,)."""
        return [self.draw_layout(stream, layout, coordinates) for stream in streams]

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        """Draw z over a slice of tensor `name`, float32 of shape (n,), which the caller may write to.

        Args:
            stream: stream of the direction.
            name: name of the coordinate tensor.
            start: index of the slice's first element in the flattened tensor.
            values: values of the slice at the beginning of the step, (n,); z is drawn on their device.
        """
        raise NotImplementedError

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        """Draw z over some rows of matrix `name`, float32 of shape (*rows.shape, columns).

        Args:
            stream: stream of the direction.
            name: name of the coordinate matrix.
            rows: row numbers, int64 of any shape; they may repeat.
            values: the whole matrix at the beginning of the step, (all rows, columns).
        """
        raise NotImplementedError

    def moves(self, stream: Stream, name: str) -> bool:
        """Return False if z is zero on all of tensor `name`; the answer is the same for all directions of a step."""
        return True

    def moving(self, stream: Stream, dimension: int) -> float:
        """Return E‖z‖², which is about the number of coordinates that move out of `dimension`."""
        return dimension

    def observe(self, stream: Stream, projected_gradients: Sequence[float]) -> None:
        """Receive the projected gradients of a step, in training and in a replay. A skipped step reports none.

        Args:
            stream: stream of any direction of that step.
            projected_gradients: c of every direction, neither clipped nor normalized.
        """

    def state(self) -> dict[str, float]:
        """Return the numbers that later directions depend on, by name; a checkpoint stores them."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Continue from numbers that `state` returned."""
