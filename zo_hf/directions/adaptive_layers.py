"""A few layers in each step, those that steps have found most along more often (AdaLeZO; Wang et al., arXiv 2604.18264).

    z_l = √w_l · g_l         g ~ N(0, I),  w_l = n_l / (k · p_l),  n_l how often layer l is among the step's k draws
    p = (1 - γ) · softmax(Q / (τ · max Q)) + γ / L                 k draws with replacement among L layers
    Q_l ← (1 - α) · Q_l + α · |c| / √w̄                            for the layers of a step, w̄ the mean of their weights

E[n_l] = k · p_l, so E[z zᵀ] = I and an estimate is on average the gradient itself, whatever Q has become.

The paper probes along g and multiplies the update of a layer by w; here each factor has its root, so that the update is along
what was probed, with the same mean. c then grows as the weights do, which √w̄ takes out of the reward. Its code begins with
Q = 0, so that the first layers to be drawn would be nearly the only ones for long; here a layer that has not been drawn counts
as the best one. It also clips w, which makes the estimate a biased one; with τ and γ as here, w is at most 3.7 · n · L / k.
τ, γ and α are those of the authors' script for LOZO.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from zo_hf.directions.distribution import Run
from zo_hf.directions.draw import NoiseLayout, draw_half_words
from zo_hf.directions.layers import Layers
from zo_hf.directions.stream import Purpose, Stream
from zo_hf.method import Method

TEMPERATURE, UNIFORM, RATE = 0.6, 0.1, 0.1
# Chances are integers over this, so that the last place of an exponential, which is not the same on all machines, is lost.
WHOLE = 2**32


class AdaptiveLayers(Layers):
    """See the formula above. Q follows from the projected gradients, which all processes and a replay have in common."""

    name = "adaptive_layers"
    about = Method("AdaLeZO (2604.18264)", memory="one number a layer", needs="a model of several layers")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._rewards: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        # What the last step found, which counts from the next one on: until then it may be estimated again.
        self._reward: float | None = None

    def weight(self, stream: Stream, name: str) -> float:
        """√w of the layer of a coordinate in a step; 0 where it does not move."""
        self.chosen(stream)
        return math.sqrt(self._weights.get(self.layer_of[name], 0.0))

    def chances(self) -> list[int]:
        """p of every layer, in the order of their names, times `WHOLE`; rounded, so that their sum may be another number."""
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
        """Q of every layer that was drawn, the last step included."""
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
