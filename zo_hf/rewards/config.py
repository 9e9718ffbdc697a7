"""`EvolutionConfig`: the arguments of `EvolutionTrainer`."""

# Annotations are not postponed, because HfArgumentParser reads the types of the fields; see `ZOConfig`.
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zo_hf.method_info import option
from zo_hf.rewards.fitness import FITNESS
from zo_hf.settings import Settings
from zo_hf.trainer.config import ZOConfig

DEFAULT_POPULATION = 16
NO_SEARCH = (
    "learning_rate='auto' needs slopes of a loss, which rewards do not give; give a number, for example that of zo_eps with "
    "fitness='z_score'."
)
#: Options of `ZOConfig`, the values that they may have here, and the way out.
_FIXED: Sequence[tuple[str, Sequence[Any], str]] = (
    ("zo_num_directions", (1,), "use population=..., which is twice the number of directions"),
    ("zo_estimator", ("two_point",), "leave it out, and set the comparison of rewards with fitness=..."),
    (
        "zo_rows_per_direction",
        (0, "0"),
        "use generations_per_prompt=2, which gives every prompt its own direction",
    ),
    (
        "zo_rule",
        ("none", "sign", "muon", "power_iteration"),
        "use zo_rule='none', 'sign', 'muon' or 'power_iteration'",
    ),
    ("zo_parallel", ("data",), "use zo_parallel='data'"),
    ("zo_pipeline_stages", ("auto", 1), "leave it out"),
    ("zo_stability_steps", (0,), "leave it out"),
    ("torch_compile", (False,), "leave it out"),
    ("zo_cuda_graph", (False,), "leave it out, because a graph needs the model's own loss"),
    ("zo_feature_cache_gib", (0,), "leave it out, because generated tokens are new in every step"),
)
#: Arguments of `GenerationConfig` that others here stand for.
_OF_GENERATION = {
    "do_sample": "temperature=... and leave do_sample out, because members share their random numbers",
    "num_beams": "num_beams=1",
    "num_return_sequences": "generations_per_prompt=...",
    "max_new_tokens": "max_completion_length=...",
    "temperature": "temperature=... of EvolutionConfig",
    "top_k": "top_k=... of EvolutionConfig",
    "top_p": "top_p=... of EvolutionConfig",
    "min_p": "min_p=... of EvolutionConfig",
}


@dataclass
class EvolutionConfig(ZOConfig):
    """Arguments of `EvolutionTrainer`: those of `ZOConfig`, and the ones below.

    `per_device_train_batch_size` counts prompts. A forward pass, as budgets and logs count them, is the answers of one
    member to a batch. Without a learning rate, the default is that of the subspace. With the fitness z_score or
    centered_ranks, a learning rate means what it means for zo_estimator=evolution: about the length of a step per
    coordinate, times the square root of half the population. With raw, it means what it means for two_point.

    Raises:
        ValueError: an option is out of range, or does not work with rewards; the message names it and the way out.
    """

    _VALID_DICT_FIELDS = [
        *ZOConfig._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    population: None | int = option(  # noqa: RUF036
        None,
        "Number of members that a step compares: both signs of half as many directions. It must be even. More "
        "members give a less noisy step. Default: num_generations if that is given, else 16.",
    )
    generations_per_prompt: None | int = option(  # noqa: RUF036
        None,
        "Number of members that answer each prompt, in pairs of both signs. 2 gives every prompt its own direction "
        "if the population is twice the number of prompts. Default: all members.",
    )
    num_generations: None | int = option(  # noqa: RUF036
        None, "GRPO's name for generations_per_prompt. If population is left out, it also sets the population."
    )
    fitness: str = option(
        "z_score",
        "The comparison of the rewards of one prompt's answers: z_score (as GRPO's advantages), centered_ranks or "
        "raw.",
    )
    reward_weights: list[float] | None = option(  # noqa: RUF009
        None, "Weight of every reward function. Default: 1 for each."
    )
    temperature: float = option(
        0.0,
        "Temperature of sampling. All members that answer a prompt share their random numbers. 0 takes the most "
        "probable token.",
    )
    top_p: float = option(
        1.0, "Total probability of the most probable tokens, from which sampling chooses; 1 keeps all."
    )
    top_k: int = option(0, "Number of the most probable tokens, from which sampling chooses; 0 keeps all.")
    min_p: None | float = option(  # noqa: RUF036
        None,
        "Smallest probability of a token that sampling may choose, as a fraction of the largest. Default: no limit.",
    )
    repetition_penalty: float = option(
        1.0, "Penalty for tokens that are already in the prompt or the answer; 1 for none."
    )
    max_completion_length: int = option(256, "Maximum number of tokens in an answer.")
    max_prompt_length: None | int = option(  # noqa: RUF036
        None, "Maximum number of tokens in a prompt; only the last ones of a longer prompt are kept. Default: all."
    )
    cache_implementation: None | str = option(  # noqa: RUF036
        None, "The key-value cache, as in GenerationConfig, for example static. Default: the model's."
    )
    generation_kwargs: dict | str | None = option(  # noqa: RUF009
        None, "More arguments of GenerationConfig, for example suppress_tokens."
    )
    chat_template_kwargs: dict | str | None = option(  # noqa: RUF009
        None, "More arguments of the chat template, for prompts that are lists of messages."
    )
    model_init_kwargs: dict | str | None = option(  # noqa: RUF009
        None, "Arguments of from_pretrained, for a model or a reward model that is given by its name."
    )
    log_completions: bool = option(False, "Print a table of the last prompts, answers and rewards with every log.")
    num_completions_to_print: None | int = option(  # noqa: RUF036
        None, "Number of rows of that table. Default: all answers to the last batch."
    )

    # Arguments of Trainer and of ZOConfig with other defaults.
    remove_unused_columns: bool = option(
        False, "Remove the columns that the model does not take. Reward functions may need them."
    )
    zo_rows_per_direction: None | str | int = option(  # noqa: RUF036
        0, "Always 0 here; generations_per_prompt decides which prompts share a direction."
    )

    def __post_init__(self) -> None:
        if self.population is None:
            self.population = DEFAULT_POPULATION if self.num_generations is None else self.num_generations
        self._check_members(self.population)
        self._check_answers()
        for name, allowed, instead in _FIXED:
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not work with EvolutionTrainer, whose losses are those of a "
                    f"population; {instead}."
                )
        if self.learning_rate == "auto":
            raise ValueError(NO_SEARCH)
        super().__post_init__()
        self.generation_arguments()

    @property
    def members_per_prompt(self) -> int:
        """Number of members that answer each prompt."""
        given = self.generations_per_prompt if self.generations_per_prompt is not None else self.num_generations
        return self.members if given is None else given

    @property
    def members(self) -> int:
        """Number of members of the population."""
        assert self.population is not None
        return self.population

    def settings(self) -> Settings:
        """The method that these arguments describe: two members for each direction."""
        return replace(super().settings(), num_directions=self.members // 2)

    def generation_arguments(self) -> dict[str, Any]:
        """Return the arguments of `GenerationConfig`.

        Raises:
            ValueError: `generation_kwargs` has one that another option stands for.
        """
        more: Any = self.generation_kwargs or {}
        for name in more:
            if name in _OF_GENERATION:
                raise ValueError(f"generation_kwargs has {name!r}; use {_OF_GENERATION[name]}.")
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_completion_length,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.cache_implementation is not None:
            arguments["cache_implementation"] = self.cache_implementation
        # A compiled forward would not see the members' weights.
        fixed = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "disable_compile": True}
        return arguments | dict(more) | fixed

    def _check_members(self, population: int) -> None:
        """Refuse numbers of members and prompts that do not divide."""
        named = "num_generations" if self.generations_per_prompt is None else "generations_per_prompt"
        both = (self.generations_per_prompt, self.num_generations)
        if None not in both and both[0] != both[1]:
            raise ValueError(
                f"num_generations={self.num_generations} and generations_per_prompt={self.generations_per_prompt} are two "
                "names of one option; leave out num_generations."
            )
        if both == (None, None) and (population < 2 or population % 2):
            raise ValueError(f"population={population} must be even and at least 2; use 16, for example.")
        count = self.members_per_prompt
        if not 2 <= count <= population or count % 2:
            raise ValueError(
                f"{named}={count} must be even, from 2 to population={population}; leave it out for all members."
            )
        if population % 2:
            raise ValueError(f"population={population} must be even; use {population + 1}.")
        if self.per_device_train_batch_size * count % population:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} prompts with {count} answers each cannot be "
                f"divided equally among population={population} members; make their product a multiple of population."
            )

    def _check_answers(self) -> None:
        """Refuse values out of range, and options of sampling without sampling."""
        if self.fitness not in FITNESS:
            raise ValueError(f"fitness={self.fitness!r} is unknown; choose one of {', '.join(FITNESS)}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must not be negative; use 0 for the likeliest tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; use 1 to keep all tokens.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; use 0 to keep all tokens.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be from 0 to 1; leave it out to keep all tokens.")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; use 1 for none.")
        if not self.temperature:
            for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", None)):
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with temperature=0, which takes the likeliest token; "
                        "set temperature=1.0."
                    )
        for name in ("max_completion_length", "max_prompt_length", "num_completions_to_print"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; leave it out for the default.")
