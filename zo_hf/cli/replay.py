"""Turn a base model and the log of a fine-tuning run into the fine-tuned model, bit for bit.

A run of zo_hf writes OUTPUT_DIR/trajectory: for every step the projected gradients, the learning rates and the clip
factor, about 40 bytes with one direction and 8 more for each further one. Directions are regenerated from the seed, so a
replay needs no data and no forward pass. Send this folder instead of the model, or keep it as a record of the run.

    zo-hf replay out --model facebook/opt-125m --output tuned
    zo-hf replay out --model facebook/opt-125m --output early --until 200
    zo-hf replay out --verify

LOG is a run's output folder, one of its checkpoints, or the log itself. The command first verifies the checksums of the
log. The base model must have exactly the weights with which the run began. It is loaded in the run's dtype, and on a GPU
if the run used one. The result equals the run bit for bit on the same kind of device with the same version of torch. A
run of a PEFT adapter gives the adapter; its starting weights are read from the log's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from zo_hf.trainer.output_paths import check_folder
from zo_hf.untrusted.fields import shown

if TYPE_CHECKING:
    from zo_hf.trajectory import Trajectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf replay`."""
    parser.add_argument("log", type=Path, metavar="LOG", help="output folder of a run, a checkpoint, or a log")
    parser.add_argument("--model", metavar="BASE", help="the base model: a name on the hub, or a folder")
    parser.add_argument("--revision", help="revision of the base model on the hub; default: the run's, if known")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop after this many steps; default: all")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the model and its tokenizer")
    parser.add_argument(
        "--verify", action="store_true", help="only check the log, and the base model if --model is given"
    )


def run(args: argparse.Namespace) -> None:
    """Verify a log, and replay it unless only verification is requested."""
    from zo_hf.trajectory import replay, verify
    from zo_hf.trajectory.base_model import load_base

    if not args.verify and (args.model is None or args.output is None):
        raise ValueError("a replay needs --model BASE and --output DIR; give both, or --verify to only check the log.")
    if args.until is not None and args.until < 0:
        raise ValueError(f"--until {args.until} must be at least 0; leave it out for all steps.")
    trajectory = verify(args.log, until=args.until)
    if not args.verify:
        check_output(args.output, args.model, trajectory)
    print(summary(trajectory))
    if args.model is None:
        return
    model = load_base(args.model, trajectory, args.revision)
    if args.verify:
        verify(args.log, model, args.until)
        print(f"{args.model} is the base model of the log")
        return
    model = replay(model, args.log, args.until, progress=True)
    model.save_pretrained(args.output)
    _save_tokenizer(args.model, args.revision, args.output)
    print(f"replayed {len(trajectory.records)} steps and saved the model in {args.output}")


def check_output(output: Path, model: str, trajectory: Trajectory) -> None:
    """Refuse a folder that cannot be written, or in which the replayed model would replace one that it depends on.

    Raises:
        ValueError: the folder is one of these.
    """
    place, log = output.resolve(), trajectory.path.resolve().parent
    if place in (log, log.parent):
        raise ValueError(
            f"--output {output} is the folder of the run, whose own model may be there; name another folder."
        )
    if Path(model).is_dir() and place == Path(model).resolve():
        raise ValueError(
            f"--output {output} is the base model's own folder, which would be overwritten; name another one."
        )
    check_folder("--output", output)


def summary(trajectory: Trajectory) -> str:
    """Return a description of a log in a few lines."""
    header, records = trajectory.header, trajectory.records
    settings, base = header["settings"], header["base"]
    skipped = sum(record.skipped for record in records)
    lines = [
        f"{trajectory.path}: {len(records)} steps in {trajectory.path.stat().st_size:,} bytes, every record intact",
        f"  base       {shown(base.get('name') or base.get('class'))} "
        f"({shown(base.get('dtype'))} on {shown(base.get('device'))})",
        f"  moves      {settings['coordinates']:,} coordinates, zo_subspace={shown(settings['zo_subspace'])}",
        f"  optimizer  {shown(header['optimizer']['kind'])}, seed {settings['seed']}",
        f"  written by zo_hf {shown(header.get('zo_hf'))}, torch {shown(header.get('torch'))}",
    ]
    if skipped:
        lines.append(f"  skipped    {skipped} steps with a loss that was not finite")
    if trajectory.dropped:
        lines.append(f"  ignored    {trajectory.dropped} bytes at the end that form no complete record")
    return "\n".join(lines)


def _save_tokenizer(name: str, revision: str | None, output: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError, KeyError, ImportError):  # the model has no tokenizer
        return
    tokenizer.save_pretrained(output)
