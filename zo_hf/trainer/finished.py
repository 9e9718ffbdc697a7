"""Runs that have ended: resumed from their last checkpoint, they take no further step."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState


def why_finished(state: TrainerState, max_steps: int, callbacks: Iterable[TrainerCallback]) -> str | None:
    """Return why the run of a checkpoint has ended, and how it would go on; None if it has not ended.

    Args:
        state: the state in the checkpoint.
        max_steps: number of steps that the resumed run takes in all.
        callbacks: the resumed run's.
    """
    if state.global_step >= max_steps:
        return f"it has taken {state.global_step} of {max_steps} steps; raise max_steps or num_train_epochs to go on"
    for callback in callbacks:
        if not isinstance(callback, EarlyStoppingCallback):
            continue
        saved = (state.stateful_callbacks or {}).get(type(callback).__name__)
        entries = saved if isinstance(saved, list) else [saved] if saved else []
        waited = max((entry["attributes"]["early_stopping_patience_counter"] for entry in entries), default=0)
        if waited >= callback.early_stopping_patience:
            return (
                f"it was stopped early, after {waited} evaluations without a better metric; raise "
                "early_stopping_patience to go on"
            )
    return None
