"""Where kernels run, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zo_hf import ZerothOrder, kernels
from zo_hf.kernels import choice

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("chosen", "device", "is_installed", "runs"),
    [
        ("auto", CUDA, True, True),
        ("auto", CUDA, False, False),
        ("auto", CPU, True, False),
        ("auto", MPS, True, False),
        ("torch", CUDA, True, False),
        ("triton", CUDA, True, True),
        ("triton", CPU, True, True),
        ("triton", CPU, False, False),
    ],
)
def test_where_they_run(
    chosen: str, device: torch.device, is_installed: bool, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "is_installed", lambda: is_installed)
    assert kernels.would_run_on(device, chosen) == runs


def test_triton_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_installed", lambda: False)
    with pytest.raises(
        ValueError, match=r"^zo_kernels='triton' needs Triton, .* use zo_kernels='auto', or pip install"
    ):
        ZerothOrder(nn.Linear(2, 2), kernels="triton")


def test_triton_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"^zo_kernels='triton' needs weights on a CUDA device, and they are on cpu; "
    ):
        ZerothOrder(nn.Linear(2, 2), kernels="triton")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zo_kernels='cuda' must be one of auto, torch, triton"):
        ZerothOrder(nn.Linear(2, 2), kernels="cuda")


def test_an_engine_chooses_and_a_replay_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", "auto")
    ZerothOrder(nn.Linear(2, 2), "norms", kernels="torch")
    assert choice._chosen == "torch"
    ZerothOrder(nn.Linear(2, 2), "norms", replays=True)
    assert choice._chosen == "torch"
