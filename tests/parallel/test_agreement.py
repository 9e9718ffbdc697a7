"""Ranks that were started alike say so in eight bytes; others all learn the same difference."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from zo_hf import ZOConfig
from zo_hf.parallel.agreement import check_agreement, facts_of_optimizer
from zo_hf.parallel.lost_ranks import RankLost, naming_lost_ranks, set_timeout, silent_ranks
from zo_hf.parallel.ranks import Grid, Ranks, ReplicasDiffer
from zo_hf.trainer.common_arguments import MAY_DIFFER, common_arguments, common_data, common_weights

CPU = torch.device("cpu")


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, grid: Grid, places: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(grid)
        self.places, self.meeting = places, barrier

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.places[self.grid.rank] = tensor
        self.meeting.wait()
        gathered = torch.stack(self.places)
        self.meeting.wait()
        self.count_bytes(tensor)
        return gathered


def answers(*facts: Mapping[str, Any]) -> tuple[set[str], int]:
    """What the ranks say to their facts, and the bytes that one of them sent."""
    places, barrier = [None] * len(facts), threading.Barrier(len(facts), timeout=20)
    ranks = [Threads(Grid(data=len(facts), rank=rank), places, barrier) for rank in range(len(facts))]

    def answer(rank: int) -> str:
        try:
            check_agreement(ranks[rank], facts[rank], CPU)
        except ReplicasDiffer as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return set(pool.map(answer, range(len(facts)))), ranks[0].bytes_sent


def test_ranks_that_agree_send_eight_bytes() -> None:
    same = {"seed": 1, "learning_rate": 1e-3, "of a class": object(), "nothing": None, "list": [1, "ä"]}
    assert answers(same, dict(same) | {"of a class": object()}, same) == ({""}, 8)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (({"seed": 1}, {"seed": 2}), "seed is 1 on rank 0 and 2 on rank 1;"),
        (({"seed": 1}, {"seed": 1}, {"seed": 3}), "seed is 1 on rank 0 and 3 on rank 2;"),
        (({}, {"seed": None}), "seed is absent on rank 0 and None on rank 1;"),
        (({"a": 1.0, "b": "x"}, {"a": 1.5, "b": "y"}), "a is 1.0 on rank 0 and 1.5 on rank 1, b is 'x' on rank 0"),
        ((dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1)), "c is 0 on rank 0 and 1 on rank 1, and 2 more;"),
        (({"a": "z" * 99 + "x" + "z" * 99}, {"a": "z" * 99 + "y"}), "zzy' on rank 1;"),
        (({"a": "x" * 500}, {"a": "y" * 5}), "xxx... on rank 0 and 'yyyyy' on rank 1;"),
        (({"weight": nn.Linear(1, 1)}, {"weight": nn.ReLU()}), "weight is 'Linear' on rank 0 and 'ReLU' on rank 1;"),
    ],
)
def test_every_rank_says_the_same_of_a_difference(facts: tuple[dict[str, Any], ...], says: str) -> None:
    (said,), _ = answers(*facts)
    assert said.startswith("the processes of this run disagree: ") and says in said
    assert said.endswith(".") and said.replace("...", "").count(". ") == 0 and len(said) < 400


def test_an_optimizer_is_its_class_its_options_and_its_shapes() -> None:
    layer = nn.Linear(2, 3)
    facts = [
        facts_of_optimizer(optimizer)
        for optimizer in (
            torch.optim.SGD(layer.parameters(), lr=0.1),
            torch.optim.SGD(layer.parameters(), lr=0.2),
            torch.optim.SGD([layer.weight], lr=0.1),
            torch.optim.AdamW(layer.parameters(), lr=0.1),
        )
    ]
    assert all(first != second for i, first in enumerate(facts) for second in facts[:i])
    assert facts[0] == facts_of_optimizer(torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1))


def test_the_weights_are_their_names_shapes_dtypes_and_flags() -> None:
    model = nn.Linear(2, 3)
    before = common_weights(model)
    assert before["the weight weight"] == "(3, 2), torch.float32, trained"
    model.weight.requires_grad_(False)
    assert common_weights(model)["the weight weight"] == "(3, 2), torch.float32"
    assert common_weights(model.half()) != before


def test_arguments_of_one_process_alone_are_left_out() -> None:
    args = ZOConfig("out", report_to=[], use_cpu=True)
    assert set(args.to_dict()) >= MAY_DIFFER - {"local_rank"}
    assert MAY_DIFFER.isdisjoint(common_arguments(args))
    assert common_arguments(args).keys() >= {"seed", "learning_rate", "zo_eps", "per_device_train_batch_size"}


def test_data_without_a_length_is_left_out() -> None:
    assert common_data([1, 2], {"a": [1], "b": iter([])}) == {
        "the length of train_dataset": 2,
        "the length of eval_dataset['a']": 1,
    }


def test_only_errors_of_collectives_are_lost_ranks() -> None:
    set_timeout(3)  # without processes there is nothing to set
    assert silent_ranks() == []
    with pytest.raises(RuntimeError, match="of the user's own"), naming_lost_ranks():
        raise RuntimeError("of the user's own")
    with pytest.raises(RankLost, match="another process of this run"), naming_lost_ranks():
        raise RuntimeError("[/a/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
