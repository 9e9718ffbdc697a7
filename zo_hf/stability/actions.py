"""The reactions of a run that has left its stable learning rates."""

ACTIONS = ("warn", "cap")


def check_action(every: int, action: str) -> None:
    """Refuse values of `zo_stability_steps` and `zo_stability_action` that are out of range or unknown.

    Raises:
        ValueError: a value is not valid; the message names the option and a valid value.
    """
    if every < 1:
        raise ValueError(f"zo_stability_steps={every} must be at least 1; leave it out to measure nothing.")
    if action not in ACTIONS:
        raise ValueError(f"zo_stability_action={action!r} is unknown; choose one of {', '.join(ACTIONS)}.")
