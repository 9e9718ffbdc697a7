"""The checkpoint that a run is resumed from: the last one whose files are as they were written, on every process."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_hf.parallel.ranks import Ranks
from zo_hf.trainer import manifest

logger = logging.getLogger(__name__)


def to_resume(asked: str | bool | None, output_dir: Path, ranks: Ranks, device: torch.device) -> Path | None:
    """Return the checkpoint folder to resume from; None to begin anew.

    Args:
        asked: a folder, or True for the last intact checkpoint in `output_dir`. The words of a command line, "True", "False" and
            "None", mean what they say unless a folder is called so.
        output_dir: the run's folder.
        ranks: the processes that train together; every one of them reads the files that it sees, and all agree.
        device: device on which the ranks communicate.

    Raises:
        ValueError: there is no such folder, or it, or every checkpoint in `output_dir`, is damaged; the message names the
            file.
    """
    asked = _understood(asked, output_dir)
    if asked is None:
        return None
    folder = _last_good(output_dir, ranks, device) if asked is True else Path(str(asked))
    if asked is not True:
        problem = manifest.problem_of(folder)
        if not ranks.all_reduce_and(torch.tensor(problem is None, device=device)):
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r} cannot be resumed, because "
                f"{problem or 'another process sees it damaged'}; pass resume_from_checkpoint=True for the last intact one."
            )
    if not manifest.is_listed(folder):
        logger.warning("%s has no %s, so its files are not checked for damage", folder, manifest.FILE)
    return folder


def _understood(asked: str | bool | None, output_dir: Path) -> str | bool | None:
    """Return a folder that exists, True, or None.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(asked, str) or (asked and Path(asked).is_dir()):
        return asked or None
    words: dict[str, bool | None] = {"true": True, "false": None, "none": None}
    if asked.lower() not in words:
        raise ValueError(
            f"resume_from_checkpoint={asked!r} is not a folder; name a checkpoint's, or use True for the last one in "
            f"{output_dir}."
        )
    return words[asked.lower()]


def _last_good(output_dir: Path, ranks: Ranks, device: torch.device) -> Path:
    """Return the last checkpoint that is good on every rank."""
    folders = _by_step(output_dir)
    problems: dict[int, str] = {}
    limit = max(folders, default=-1)
    while True:
        own = next(
            (step for step in sorted(folders, reverse=True) if step <= limit and _is_good(step, folders, problems)), -1
        )
        seen = ranks.all_gather(torch.tensor(own, device=device)).tolist()
        if min(seen) == max(seen):
            break
        limit = min(seen)  # the ranks look again, from the oldest of their choices
    if own >= 0:
        for step in sorted((step for step in problems if step > own), reverse=True):
            logger.warning("%s is skipped, because %s", folders[step], problems[step])
        return folders[own]
    if ranks.all_reduce_and(torch.tensor(not folders, device=device)):
        reason = "it has none"
    else:
        reason = f"{folders[max(folders)].name}: {problems[max(folders)]}" if problems else "other processes lack it"
    raise ValueError(
        f"resume_from_checkpoint=True finds no intact checkpoint in {output_dir} ({reason}); leave it out to start from the beginning."
    )


def _is_good(step: int, folders: dict[int, Path], problems: dict[int, str]) -> bool:
    """Return whether a checkpoint is good; if not, note why."""
    problem = manifest.problem_of(folders[step])
    if problem is not None:
        problems[step] = problem
    return problem is None


def _by_step(output_dir: Path) -> dict[int, Path]:
    """Return Trainer's checkpoint folders by their step."""
    found = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if number and folder.is_dir():
            found[int(number[1])] = folder
    return found
