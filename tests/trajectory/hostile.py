"""Logs as somebody would write them who knows the format: any header and any records, under valid checksums."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from zo_hf.trajectory.log import Trajectory

#: What JSON can hold in the place of any value, as text, because json.dumps does not write all of it.
VALUES = (
    "null",
    "true",
    "false",
    "0",
    "-0.0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "1.5",
    "-1e-3",
    "5e-324",
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    str(1 << 16),
    str(1 << 31),
    str(1 << 32),
    str(1 << 63),
    str(1 << 200),
    "9" * 5000,
    '""',
    '"nan"',
    '"-1"',
    '"4"',
    '"full"',
    '"gaussian"',
    '"../../../../etc/passwd"',
    '"\\u001b[2J\\u0007"',
    '"\\ud800"',
    '"os.system"',
    json.dumps("x" * 100_000),
    "[]",
    "{}",
    "[[]]",
    "[1e999]",
    "[null]",
    '["a", "a"]',
    '{"a": {"b": {"c": []}}}',
    "[" * 200 + "]" * 200,
    "[" * 50_000 + "]" * 50_000,
    json.dumps([0] * 50_000),
)
NUMBERS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e-300, 1e20, -1e20, 1e21, 3.4e38, 3.41e38, -1e39, 1e300, 1.7e308)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
METHODS = {
    "zo_subspace": ("auto", "low_rank", "core", "full", "adapter", "norms", "scales"),
    "zo_estimator": (
        "two_point",
        "one_sided",
        "fzoo",
        "evolution",
        "evolution_ranks",
        "forward_gradient",
        "second_difference",
        "coordinate",
        "coordinate_forward",
    ),
    "zo_direction": ("gaussian", "rademacher", "sphere", "orthogonal", "sparse", "layers", "lezo", "adaptive_layers"),
    "zo_rule": ("none", "sign", "conservative", "curvature", "hizoo", "muon", "power_iteration", "cocd", "svrg"),
    "zo_rank": (1, 2, 3, 5, 7, 8, 63, 1 << 20),
    "zo_fold_steps": (0, 1, 2, 5, 1 << 40),
    "zo_num_directions": (1, 2, 3, 4, 64, 1 << 15, 1 << 16),
    "zo_rows_per_direction": (0, 1, 2, 1 << 30, "auto"),
    "zo_svrg_batches": (1, 2, 1 << 20, 1 << 40),
    "zo_svrg_steps": (1, 2, 1 << 40),
    "zo_cocd_memory": (1, 3, 1 << 40),
    "zo_spectral_rank": (1, 2, 1 << 40),
    "zo_active_layers": (0.01, 0.25, 1.0),
    "zo_normalize": (True, False),
    "zo_max_projected_grad": (0.0, 1e-3, 1e300),
    "zo_momentum": (0.0, 0.9),
    "zo_eps": (5e-324, 1e-3, 1e308),
    "zo_coordinate_order": ("cyclic", "permuted"),
    "seed": (0, 1, -1, (1 << 63) - 1),
    "coordinates": (1, 2, 1 << 40),
}
OPTIMIZERS = ("SGD", "Adam", "AdamW", "SeededSGD", "Adafactor", "__class__", "")
FLAGS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 128, 255)


@dataclass(frozen=True)
class Body:
    """A record as it stands in the file: step, flags and numbers (c of every direction, rates of the groups, clip)."""

    step: int
    flags: int
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Parts:
    """A log without its checksums: the header as JSON text, and the records."""

    header: str
    bodies: tuple[Body, ...]

    def signed(self) -> bytes:
        """Return the file, every checksum of which is valid."""
        text = self.header.encode("utf-8", "surrogatepass")
        content = struct.pack("<8sHI", b"ZOTRAJ\r\n", 1, len(text)) + text
        crc = zlib.crc32(content)
        content += struct.pack("<I", crc)
        for body in self.bodies:
            packed = struct.pack(f"<IB{len(body.numbers)}d", body.step & 0xFFFFFFFF, body.flags, *body.numbers)
            crc = zlib.crc32(packed, crc)
            content += packed + struct.pack("<I", crc)
        return content


def parts_of(trajectory: Trajectory) -> Parts:
    """Take a log apart."""
    bodies = []
    for record in trajectory.records:
        numbers = (*record.projected_gradients, *record.learning_rates, record.clip_factor)
        rest = (0.0,) * (len(numbers) - 1)
        bodies += [Body(record.step, 4, (float(index), *rest)) for index in record.begins]
        bodies.append(Body(record.step, record.skipped + 2 * record.unfaithful, numbers))
    return Parts(json.dumps(trajectory.header), tuple(bodies))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a header; of a list, only the first and the last item's."""
    yield path
    items = content.items() if isinstance(content, dict) else []
    if isinstance(content, list):
        items = [(i, content[i]) for i in sorted({0, len(content) - 1}) if content]
    for key, value in items:
        yield from places(value, (*path, key))


def with_text(parts: Parts, path: tuple[Any, ...], text: str) -> Parts:
    """Put a JSON text in the place of a value."""
    if not path:
        return replace(parts, header=text)
    header = json.loads(parts.header)
    _at(header, path[:-1])[path[-1]] = "\0here\0"
    return replace(parts, header=json.dumps(header).replace(json.dumps("\0here\0"), text))


def changed(parts: Parts, change: Callable[[dict[str, Any]], object]) -> Parts:
    """Change the header as an object."""
    header = json.loads(parts.header)
    change(header)
    return replace(parts, header=json.dumps(header))


def mutated_header(parts: Parts, random: random.Random) -> tuple[str, Parts]:
    """Put any value in any place of the header, or remove what is there; returns what was done, too."""
    header = json.loads(parts.header)
    path = random.choice([p for p in places(header) if p or random.random() < 0.1])
    if path and random.random() < 0.1:
        return f"without {path}", changed(parts, lambda h: _at(h, path[:-1]).pop(path[-1]))
    text = random.choice(VALUES)
    return f"{path} = {text[:20]}", with_text(parts, path, text)


def mutated_method(parts: Parts, random: random.Random) -> tuple[str, Parts]:
    """Exchange one or two parts of the method for others that exist."""
    done, count = {}, random.choice((1, 1, 2, 3))
    for name in random.sample(sorted(METHODS), count):
        done[name] = random.choice(METHODS[name])
    return f"{done}", changed(parts, lambda h: h["settings"].update(done))


def mutated_records(parts: Parts, random: random.Random) -> tuple[str, Parts]:
    """Change the records: a number, a flag, a step, or which of them there are and in which order."""
    bodies = list(parts.bodies)
    at = random.randrange(len(bodies))
    body = bodies[at]
    what = random.choice(
        ("number", "number", "number", "all", "flags", "step", "order", "twice", "gone", "begins", "size")
    )
    if what in ("number", "all"):
        value = random.choice(NUMBERS + NOT_FINITE)
        index = random.choice((0, len(body.numbers) - 1, len(body.numbers) - 2, random.randrange(len(body.numbers))))
        for i in range(len(bodies)) if what == "all" else (at,):
            numbers = list(bodies[i].numbers)
            numbers[index] = value
            bodies[i] = replace(bodies[i], numbers=tuple(numbers))
        what += f" {index} of {at} = {value}"
    elif what == "flags":
        bodies[at] = replace(body, flags=random.choice(FLAGS))
        what += f" {bodies[at].flags} of {at}"
    elif what == "step":
        bodies[at] = replace(body, step=body.step + random.choice((-1, 1, 1 << 31, (1 << 32) - 1)))
    elif what == "order":
        random.shuffle(bodies)
    elif what == "twice":
        bodies.insert(at, body)
    elif what == "gone":
        del bodies[at]
    elif what == "begins":
        rest = random.choice((0.0, 1.0))
        index = random.choice((0.0, 1.0, 0.5, -1.0, 1e9, float("nan"), float("inf")))
        begin = Body(body.step, 4, (index, *(rest,) * (len(body.numbers) - 1)))
        bodies[at:at] = [begin] * random.choice((1, 2))
    else:
        bodies = [replace(b, numbers=b.numbers + (1.0,) * random.choice((1, 2))) for b in bodies]
    return what, replace(parts, bodies=tuple(bodies))


def mutated_groups(parts: Parts, random: random.Random) -> tuple[str, Parts]:
    """Change which coordinates move, in which group, with which optimizer and options, and which begin later."""
    header = json.loads(parts.header)
    groups = header["groups"]
    what = random.choice(
        ("unknown", "twice", "gone", "moved", "still", "kind", "option", "option", "more", "none", "base")
    )
    group = random.choice(groups)
    names = [name for one in groups for name in one["names"]]
    if what == "unknown":
        group["names"][0] = random.choice(("no.such.weight", "model", ".*", "", group["names"][0] + "\n"))
    elif what == "twice":
        groups[-1]["names"].append(groups[0]["names"][0])
    elif what == "gone":
        group["names"].pop()
    elif what == "moved":
        groups[-1]["names"].append(groups[0]["names"].pop(0))
    elif what == "still":
        header["still"] = random.choice(([names[0]], names, [*names, names[0]], ["no.such.weight"], [names[-1]]))
    elif what == "kind":
        header["optimizer"]["kind"] = random.choice(OPTIMIZERS)
    elif what == "option" and group["options"]:
        name = random.choice(sorted(group["options"]))
        group["options"][name] = random.choice(
            (None, True, False, -1, 0, 1, 2, 1e10, 1e300, -1e-9, "a", [], [0.9, 0.999], [1, 1], [0, 0, 0], [True, 2])
        )
        what += f" {name} = {group['options'][name]}"
    elif what == "more":
        group["options"] |= random.choice(
            ({"params": ["x"]}, {"lr": 1e300}, {"initial_lr": "a"}, {"foreach": True, "fused": True}, {"x": [[1]]})
        )
    elif what == "none":
        groups.append({"names": [], "options": {}})
    else:
        header["base"] |= random.choice(
            ({"weights": None}, {"weights": "0" * 64}, {"weights": "A" * 64}, {"device": "cuda"}, {"name": "a\nb"})
        )
    return f"groups: {what}", replace(parts, header=json.dumps(header))


MUTATIONS = (mutated_header, mutated_header, mutated_method, mutated_records, mutated_records, mutated_groups)


def damaged(content: bytes, random: random.Random) -> tuple[str, bytes]:
    """Flip bits, cut, repeat or extend a file, without new checksums."""
    what = random.choice(("flips", "cut", "insert", "zeros", "repeat"))
    position = random.randrange(len(content))
    if what == "flips":
        flipped = bytearray(content)
        for _ in range(random.choice((1, 2, 20))):
            flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
        return what, bytes(flipped)
    if what == "cut":
        return f"cut at {position}", content[:position]
    if what == "insert":
        return f"insert at {position}", content[:position] + random.randbytes(8) + content[position:]
    if what == "zeros":
        return f"zeros from {position}", content[:position] + bytes(len(content) - position)
    return what, content + content[position:]


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content
