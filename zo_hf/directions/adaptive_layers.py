"""A few layers in each step, preferably those with a large |c| so far (AdaLeZO; Wang et al., arXiv 2604.18264).

    z_l = √w_l · g_l         g ~ N(0, I),  w_l = n_l / (k · p_l),  n_l how often layer l is among the step's k draws
    p = (1 - γ) · softmax(Q / (τ · max Q)) + γ / L                 k draws with replacement among L layers
    Q_l ← (1 - α) · Q_l + α · |c| / √w̄                            for the layers of a step, w̄ the mean of their weights

E[n_l] = k · p_l, so E[z zᵀ] = I: for any Q, an estimate is on average the gradient itself.

The paper probes along g and multiplies the update of a layer by w. Here probe and update both carry √w, so that the
update moves along the probed direction and keeps its mean. This makes c grow with the weights, and the factor 1/√w̄
undoes it in Q.

The authors' code starts from Q = 0, which makes it draw almost only the first few layers for a long time. Here a layer
that has not been drawn yet counts as the best one. The authors' code also clips w, which biases the estimate. Here w
is at most 3.7 · n · L / k, with these τ and γ, and is not clipped. The values of τ, γ and α are those of the authors'
script for LOZO.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from zo_hf.directions.distribution import DirectionContext
from zo_hf.directions.layers import Layers
from zo_hf.method_info import Method
from zo_hf.rng.draw import NoiseLayout, draw_half_words
from zo_hf.rng.stream import Purpose, Stream

#: τ, γ and α of the formula.
TEMPERATURE, UNIFORM, RATE = 0.6, 0.1, 0.1
# Chances are whole multiples of 1 / WHOLE, because machines differ in the last place of an exponential.
WHOLE = 2**32


class AdaptiveLayers(Layers):
    """Gaussian directions on layers drawn with the probabilities p of the formula above.

    Q depends on the projected gradients alone, which every process and every replay knows.
    """

    name = "adaptive_layers"
    aliases = ()
    about = Method("AdaLeZO (2604.18264)", memory="one number per layer", needs="a model with several layers")

    def __init__(self, context: DirectionContext) -> None:
        super().__init__(context)
        self._rewards: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        # The last step's reward enters Q only when the next step begins: until then the step may be estimated again.
        self._reward: float | None = None

    def weight(self, stream: Stream, name: str) -> float:
        """Return √w of the layer that holds coordinate `name`, or 0 if that layer does not move in this step."""
        self.chosen(stream)
        return math.sqrt(self._weights.get(self.layer_of[name], 0.0))

    def chances(self) -> list[int]:
        """Return p · `WHOLE` of every layer, rounded to integers, in the order of the layers' names.

        The sum may differ from `WHOLE` because of the rounding.
        """
        best = max(self._rewards.values(), default=0.0)
        scores = [self._rewards.get(layer, best) / best if best else 1.0 for layer in self._layers]
        raised = [math.exp((score - 1.0) / TEMPERATURE) for score in scores]
        total, even = math.fsum(raised), UNIFORM / len(raised)
        return [round(((1 - UNIFORM) * part / total + even) * WHOLE) for part in raised]

    def _choose(self, stream: Stream) -> set[str]:
        self._rewards, self._reward = self._rewards_so_far(), None
        chances, count = self.chances(), self._count
        ends = list(accumulate(chances))
        draw = Stream(stream.seed, stream.step, purpose=Purpose.LAYERS)
        words = draw_half_words(draw, "layers", 0, 2 * count).view(-1, 2).tolist()
        places = Counter(bisect_right(ends, (high << 16 | low) * ends[-1] >> 32) for high, low in words)
        self._weights = {
            self._layers[place]: times * ends[-1] / (count * chances[place]) for place, times in places.items()
        }
        return set(self._weights)

    def observe(self, stream: Stream, projected_gradients: Sequence[float]) -> None:
        self.chosen(stream)
        mean = math.fsum(self._weights.values()) / len(self._weights)
        size = math.fsum(abs(c) for c in projected_gradients) / len(projected_gradients)
        self._reward = size / math.sqrt(mean)

    def _rewards_so_far(self) -> dict[str, float]:
        """Return Q of every layer that has been drawn, with the last step included."""
        rewards = dict(self._rewards)
        if self._reward is not None:
            for layer in self._chosen:
                before = rewards.get(layer, self._reward)
                rewards[layer] = (1 - RATE) * before + RATE * self._reward
        return rewards

    def moving(self, stream: Stream, dimension: int) -> float:
        return sum(size * self.weight(stream, name) ** 2 for name, size in self._sizes.items())

    def draw_layout(self, stream: Stream, layout: NoiseLayout, coordinates: Mapping[str, Tensor]) -> Tensor:
        z = super().draw_layout(stream, layout, coordinates)
        for name, view in layout.views(z).items():
            view.mul_(self.weight(stream, name))
        return z

    def draw_slice(self, stream: Stream, name: str, start: int, values: Tensor) -> Tensor:
        return super().draw_slice(stream, name, start, values).mul_(self.weight(stream, name))

    def draw_rows(self, stream: Stream, name: str, rows: Tensor, values: Tensor) -> Tensor:
        return super().draw_rows(stream, name, rows, values).mul_(self.weight(stream, name))

    def state(self) -> dict[str, float]:
        return self._rewards_so_far()

    def load_state(self, state: Mapping[str, float]) -> None:
        self._rewards, self._reward, self._step = dict(state), None, None
