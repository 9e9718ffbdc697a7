"""Where kernels run, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.methods.table import DEVICE
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
    monkeypatch.setattr(choice, "why_not_on", lambda device: None)
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


def _fails(*_: object) -> torch.Tensor:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (_fails, "RuntimeError: Failed to find C compiler"),
        (lambda *_: torch.zeros(1, 2, dtype=torch.int64), "it draws other numbers than it should"),
    ],
    ids=["no compiler", "other numbers"],
)
def test_torch_takes_the_place_of_kernels_that_do_not_work(
    draw: Callable, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning under "auto"; "triton" is refused."""
    random_blocks = pytest.importorskip("zo_hf.kernels.random_blocks")
    monkeypatch.setattr(random_blocks, "random_blocks", draw)
    choice.why_not_on.cache_clear()
    try:
        assert choice.why_not_on(CPU) == choice.why_not_on(CPU) == reason
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        with pytest.raises(ValueError, match=rf"does not run on cpu \({reason}\); use zo_kernels='torch'"):
            kernels.choose("triton", CPU)
        monkeypatch.setattr(choice, "why_not_on", lambda device: reason)
        assert not kernels.would_run_on(CUDA, "auto")
    finally:
        monkeypatch.undo()
        choice.why_not_on.cache_clear()


def test_old_gpus_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choice._failure(CUDA) == "its compute capability is below 8.0"


def test_a_kernel_that_works_draws_the_published_numbers() -> None:
    pytest.importorskip("triton")
    assert choice.why_not_on(DEVICE) is None


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zo_kernels='cuda' must be one of auto, torch, triton"):
        ZerothOrder(nn.Linear(2, 2), kernels="cuda")


def test_an_engine_chooses_and_a_replay_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", "auto")
    ZerothOrder(nn.Linear(2, 2), "norms", kernels="torch")
    assert choice._chosen == "torch"
    ZerothOrder(nn.Linear(2, 2), "norms", replays=True)
    assert choice._chosen == "torch"


def test_every_engine_computes_by_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after another one has been made in the same process, and while both take steps in turn."""
    monkeypatch.setattr(choice, "_chosen", "auto")
    seen: list[str] = []
    model, other = (nn.Linear(3, 1) for _ in range(2))

    def loss() -> torch.Tensor:
        seen.append(choice._chosen)
        return model(torch.ones(2, 3)).mean()

    zo, other_zo = (ZerothOrder(m, "norms", kernels=kernels) for m, kernels in ((model, "torch"), (other, "auto")))
    zo.estimate(loss)
    other_zo.estimate(lambda: other(torch.ones(2, 3)).mean())
    zo.apply([1.0], skipped=False)
    seen.append(choice._chosen)
    other_zo.finish()
    zo.finish()
    assert seen == ["torch"] * 3 and choice._chosen == "torch"
