"""Learning from rewards of generated text, by evolution strategies."""

from zo_hf.rewards.config import EvolutionConfig
from zo_hf.rewards.trainer import EvolutionTrainer

__all__ = ["EvolutionConfig", "EvolutionTrainer"]
