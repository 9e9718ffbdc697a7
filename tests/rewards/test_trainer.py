"""Runs that learn from rewards: like every other run of the trainer, and they learn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from tests.conftest import assert_same_bits, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, weights_of
from tests.quantized_models import quantize
from tests.rewards.runs import config, counts_wanted, make_trainer, odd_words, prompts, tokenizer, trained
from tests.trainer.runs import logged, with_lora
from zo_hf import ZOConfig
from zo_hf.quantization import stored_tensors
from zo_hf.rewards import EvolutionConfig, EvolutionTrainer
from zo_hf.stability.monitor import StabilityCallback
from zo_hf.subspaces.peft_methods import is_peft
from zo_hf.trajectory import replay

SAMPLED = {"temperature": 0.7, "top_k": 20}


def model() -> torch.nn.Module:
    return seeded(tiny_llama, eos_token_id=1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        SAMPLED,
        SAMPLED | {"gradient_accumulation_steps": 2, "generations_per_prompt": 2, "optim": "adamw_torch"},
        {"zo_subspace": "full", "learning_rate": 1e-3, "zo_fold_steps": None},
    ],
    ids=str,
)
def test_resume_and_replay_are_bit_exact(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | options
    whole = trained(tmp_path, model(), **options)
    expected = weights_of(whole.model)
    assert_same_bits(weights_of(replay(model(), tmp_path)), expected)
    again = trained(tmp_path / "again", model(), **options)
    assert_same_bits(weights_of(again.model), expected)
    resumed = trained(tmp_path / "again", model(), resume=str(tmp_path / "again/checkpoint-2"), **options)
    assert_same_bits(weights_of(resumed.model), expected)
    assert logged(resumed, "reward") == logged(whole, "reward")
    before = weights_of(model())
    assert any(not torch.equal(before[name], expected[name]) for name in expected)


def test_micro_batches_are_one_batch(tmp_path: Path) -> None:
    options = SAMPLED | {"generations_per_prompt": 2, "max_steps": 2, "zo_fold_steps": 0}
    one = trained(tmp_path, **options)
    two = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert logged(one, "reward") == pytest.approx(logged(two, "reward"))
    assert logged(one, "reward_std") == pytest.approx(logged(two, "reward_std"))
    for name, tensor in weights_of(one.model).items():
        torch.testing.assert_close(weights_of(two.model)[name], tensor)


def test_a_last_batch_of_fewer_prompts(tmp_path: Path) -> None:
    # Five prompts make a batch of four and one of one, which half of the members answer.
    options = {"generations_per_prompt": 2, "max_steps": 2, "more": {"train_dataset": prompts(5)}}
    trainer = trained(tmp_path, **options)
    assert len(logged(trainer, "reward")) == 2 and all(logged(trainer, "grad_norm"))


def test_lora(tmp_path: Path) -> None:
    from peft import LoraConfig

    options = {"max_steps": 2, "learning_rate": 1e-1, "zo_fold_steps": None, "zo_eps": 0.3}
    trainer = trained(tmp_path, with_lora(model()), **options)
    assert trainer.args.settings().subspace_of(trainer.model) == "adapter"
    assert all(logged(trainer, "grad_norm"))
    given = make_trainer(tmp_path, more={"peft_config": LoraConfig(target_modules="all-linear")}, zo_fold_steps=None)
    assert is_peft(given.model)


@pytest.mark.parametrize("kind", ["int8", "torchao"])
def test_an_8_bit_model(kind: str, tmp_path: Path) -> None:
    def small() -> torch.nn.Module:
        return quantize(model(), kind)

    options = {"max_steps": 3, "zo_subspace": "low_rank", "zo_eps": 0.3, "learning_rate": 0.1}
    trainer = trained(tmp_path, small(), zo_fold_steps=2, **options)
    assert all(logged(trainer, "grad_norm"))
    replayed = replay(small(), tmp_path)
    actual, expected = stored_tensors(replayed), stored_tensors(trainer.model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert trainer.evaluate(prompts(4))["eval_reward"]
    becomes = trained(tmp_path / "lora", small(), zo_fold_steps=0, **options)
    assert is_peft(becomes.model) and becomes.evaluate(prompts(4))["eval_reward"]


def test_names_of_models(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    args = config(tmp_path, max_steps=1, model_init_kwargs={"attn_implementation": "eager"})
    trainer = EvolutionTrainer(str(tmp_path / "model"), odd_words, args, train_dataset=prompts())
    trainer.train()
    assert trainer.model.config._attn_implementation == "eager"
    expected = logged(trained(tmp_path, max_steps=1), "reward")
    assert logged(trainer, "reward") == pytest.approx(expected)


def test_evaluation(tmp_path: Path) -> None:
    data = prompts(5)
    trainer = make_trainer(tmp_path, more={"eval_dataset": data}, per_device_eval_batch_size=2)
    before = weights_of(trainer.model)
    metrics = trainer.evaluate()
    answers = []
    for prompt in data["prompt"]:
        ids = tokenizer()(prompt, return_tensors="pt")
        found = trainer.model.generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        answers.append(tokenizer().decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    expected = odd_words(answers)
    assert metrics["eval_reward"] == pytest.approx(sum(expected) / 5) == metrics["eval_rewards/odd_words/mean"]
    assert metrics["eval_loss"] == pytest.approx(-sum(expected) / 5, rel=1e-6)
    assert metrics["eval_reward_std"] == pytest.approx(torch.tensor(expected).std().item())
    assert_same_bits(weights_of(trainer.model), before)


def test_evaluations_sample_alike(tmp_path: Path) -> None:
    more = {"eval_dataset": prompts(6)}
    found = [
        make_trainer(tmp_path, more=more, per_device_eval_batch_size=size, temperature=1.0).evaluate()["eval_reward"]
        for size in (2, 3, 6)
    ]
    assert found[0] == found[1] == found[2]
    greedy = make_trainer(tmp_path, more=more).evaluate()["eval_reward"]
    assert greedy != found[0]


def test_the_best_model_has_the_highest_reward(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "learning_rate": 1.0}
    trainer = trained(tmp_path, more={"eval_dataset": prompts(6)}, **options)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(max(logged(trainer, "eval_reward")))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "generations_per_prompt": 8}], ids=str)
def test_a_wanted_word_becomes_common(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {
        "max_steps": 30,
        "population": 32,
        "per_device_train_batch_size": 8,
        "zo_eps": 0.1,
        "learning_rate": 1.0,
    }
    trainer = trained(tmp_path, rewards=counts_wanted, max_completion_length=2, zo_fold_steps=0, **options)
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.2 and rewards[-1] > (0.4 if options["temperature"] else 1.4)


@pytest.mark.parametrize("fitness", ["centered_ranks", "raw"])
def test_every_fitness_learns(fitness: str, tmp_path: Path) -> None:
    rate = {"centered_ranks": 2.0, "raw": 0.2}[fitness]
    options = {
        "max_steps": 25,
        "population": 32,
        "per_device_train_batch_size": 8,
        "zo_eps": 0.1,
        "learning_rate": rate,
    }
    trainer = trained(tmp_path, max_completion_length=2, zo_fold_steps=0, fitness=fitness, **options)
    rewards = logged(trainer, "reward")
    assert rewards[-1] > rewards[0] + 0.3


NAMED = [
    ({"population": 3}, "population=3 must be even and at least 2"),
    ({"population": 8, "generations_per_prompt": 3}, "generations_per_prompt=3 must be even, from 2 to population=8"),
    ({"population": None, "num_generations": 5}, "num_generations=5 must be even"),
    ({"population": 5, "generations_per_prompt": 2}, "population=5 must be even; use 6"),
    ({"population": 8, "num_generations": 10}, "num_generations=10 must be even, from 2 to population=8"),
    ({"generations_per_prompt": 2, "num_generations": 4}, "two names of one option; leave out num_generations"),
    (
        {"population": 6, "generations_per_prompt": 2},
        "4 prompts with 2 answers each .* make their product a multiple",
    ),
    ({"fitness": "best"}, "fitness='best' is unknown; choose one of z_score, centered_ranks, raw"),
    ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
    ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0 must be above 0"),
    ({"top_p": 0.9}, "top_p=0.9 has no effect with temperature=0.* set temperature=1.0"),
    ({"top_k": 5}, "top_k=5 has no effect with temperature=0"),
    ({"top_k": -1, "temperature": 1.0}, "top_k=-1 must not be negative"),
    ({"min_p": 2.0, "temperature": 1.0}, "min_p=2.0 must be from 0 to 1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
    ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
    ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
    ({"generation_kwargs": {"do_sample": True}}, "generation_kwargs has 'do_sample'; use temperature"),
    ({"generation_kwargs": {"num_beams": 4}}, "generation_kwargs has 'num_beams'; use num_beams=1"),
    ({"zo_num_directions": 4}, "zo_num_directions=4 does not work with EvolutionTrainer.* use population"),
    ({"zo_estimator": "one_sided"}, "zo_estimator='one_sided' does not work .* fitness"),
    ({"zo_rows_per_direction": 1}, "zo_rows_per_direction=1 does not work .* generations_per_prompt=2"),
    ({"zo_rule": "svrg"}, "zo_rule='svrg' does not work .* use zo_rule='none'"),
    ({"zo_parallel": "directions"}, "zo_parallel='directions' does not work .* use zo_parallel='data'"),
    ({"zo_pipeline_stages": 2}, "zo_pipeline_stages=2 does not work"),
    ({"zo_stability_steps": 5}, "zo_stability_steps=5 does not work"),
    ({"torch_compile": True}, "torch_compile=True does not work"),
    ({"zo_cuda_graph": True, "zo_batched_probes": True}, "zo_cuda_graph=True does not work .* leave it out"),
    ({"learning_rate": "auto"}, "learning_rate='auto' needs slopes of a loss"),
]


@pytest.mark.parametrize(("options", "message"), NAMED, ids=str)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("unused", **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": seeded(tiny_bert)}, "needs a causal language model"),
        ({"model": seeded(tiny_t5)}, "needs a causal language model"),
        ({"model": 3}, "model is a int; EvolutionTrainer needs a causal language model"),
        ({"args": ZOConfig("unused")}, "args is a ZOConfig; EvolutionTrainer needs a zo_hf.rewards.EvolutionConfig"),
        ({"reward_funcs": []}, "reward_funcs is empty"),
        ({"reward_funcs": [3]}, "reward_funcs has a int; give functions"),
        ({"reward_processing_classes": [None, None]}, "has 2 entries for 1 reward_funcs; give one for each"),
        (
            {"train_dataset": prompts(4).rename_column("prompt", "text")},
            "train_dataset has the columns text; .* 'prompt'",
        ),
        ({"processing_class": "words"}, "processing_class is a str; give the model's tokenizer"),
    ],
    ids=str,
)
def test_refused_arguments(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"model": model(), "reward_funcs": odd_words, "args": config(tmp_path), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match=message):
        EvolutionTrainer(**given | {"train_dataset": prompts(4)} | changed)


def test_no_search_and_no_curvature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs slopes of a loss, which rewards do not give; give a number"):
        make_trainer(tmp_path).find_learning_rate()
    trainer = make_trainer(tmp_path, more={"callbacks": [StabilityCallback(2)]})
    with pytest.raises(ValueError, match=r"StabilityCallback measures the curvature .* leave it out of callbacks"):
        trainer.train()


def test_weights_for_each_function(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_weights has 2 numbers for 1 reward_funcs; give one for each"):
        make_trainer(tmp_path, reward_weights=[1.0, 2.0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "w9"}], "has the columns text; EvolutionTrainer needs a column 'prompt'"),
        ([{"prompt": ""}], "the prompt '' has no tokens"),
        ([{"prompt": 3}], "a prompt is a int; give a text or a list of messages"),
    ],
    ids=str,
)
def test_refused_rows(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, more={"train_dataset": rows}, per_device_train_batch_size=4)


def test_long_prompts_lose_their_beginning(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_prompt_length=2)
    batch = trainer.data_collator([{"prompt": "w9"}, {"prompt": "w20 w21 w22"}])
    assert batch["input_ids"].tolist() == [[0, 9], [21, 22]] and batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("options", "population", "per_prompt"),
    [
        ({}, 16, 16),
        ({"num_generations": 4}, 4, 4),
        ({"generations_per_prompt": 4}, 16, 4),
        ({"num_generations": 4, "population": 8}, 8, 4),
    ],
    ids=str,
)
def test_numbers_of_members(options: dict[str, int], population: int, per_prompt: int) -> None:
    args = EvolutionConfig("unused", per_device_train_batch_size=8, use_cpu=True, **options)
    assert (args.members, args.members_per_prompt, args.settings().num_directions) == (
        population,
        per_prompt,
        population // 2,
    )


def test_a_command_line() -> None:
    line = ["--output_dir", "unused", "--use_cpu", "--population", "8", "--reward_weights", "1", "2", "--min_p", "0.1"]
    line += ["--generation_kwargs", '{"suppress_tokens": [3]}', "--temperature", "0.5", "--zo_rows_per_direction", "0"]
    (args,) = HfArgumentParser(EvolutionConfig).parse_args_into_dataclasses(line)
    assert (args.population, args.reward_weights, args.min_p) == (8, [1.0, 2.0], 0.1)
    assert args.generation_arguments()["suppress_tokens"] == [3] and args.settings().rows_per_direction == 0


@pytest.mark.parametrize("population", [2, 8])
def test_a_step_counts_its_members(population: int, tmp_path: Path) -> None:
    trainer = trained(
        tmp_path, seeded(tiny_gpt2), population=population, max_steps=2, zo_max_forward_passes=3 * population
    )
    assert list(itertools.chain(logged(trainer, "zo/forward_passes"))) == [2 * population, 3 * population]
