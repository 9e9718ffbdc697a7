"""YAML files of options with content that no options have."""

from __future__ import annotations

from pathlib import Path

import pytest

from zo_hf.tasks.job_options import read_options

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        b"a: !!python/object/apply:os.system [exit 1]",
        b"a: !!python/name:os.system",
        BOMB.encode(),
        b"a: &a [*a]",
        b"a: " + b"[" * 50_000,
        b"\xff\xfe\xff",
        b"- a",
        b"a: {",
        b"unknown: 1",
        b"1: 1",
    ],
    ids=["object", "name", "aliases", "itself", "nested", "bytes", "list", "cut off", "unknown", "number"],
)
def test_hostile_options_are_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"options\.yaml") as error:
        read_options(path, set("abcdefghi"))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
