"""Commands answer a wrong argument in one sentence, and show the traceback of everything else."""

from __future__ import annotations

import pytest

from zo_hf.rules import RuleOptions
from zo_hf.stability import Moments, next_moments
from zo_hf.tasks.refusals import refusals_end_the_command, wrong_arguments_end_the_command


def test_a_refusal_of_this_package_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, refusals_end_the_command():
        RuleOptions(momentum=2.0)
    assert exit_info.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: zo_momentum=2.0 must be a finite number of at least 0 and below 1; use 0 for none.\n"
    )


def test_after_the_first_step_every_error_passes() -> None:
    with pytest.raises(ValueError, match=r"zo_momentum=2\.0"), refusals_end_the_command() as first_step:
        first_step.on_step_end(None, None, None)
        RuleOptions(momentum=2.0)


def test_errors_of_other_code_pass() -> None:
    with pytest.raises(ValueError, match="raised in a test"), refusals_end_the_command():
        raise ValueError("this was raised in a test.")
    with pytest.raises(KeyError), refusals_end_the_command():
        {}["no such key"]


def test_a_bug_of_this_package_passes() -> None:
    """numpy raises the error in a frame of this package, but its message is no sentence."""
    with pytest.raises(ValueError, match="broadcast"), refusals_end_the_command():
        next_moments(Moments.at([1.0, 2.0]), 0.1, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("error", [OSError("no file."), ImportError("no package."), ValueError("no number.")])
def test_while_loading_all_errors_of_arguments_end_the_command(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info, wrong_arguments_end_the_command():
        raise error
    assert exit_info.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"
