"""The generator against Random123's published vectors and against a second implementation on Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_hf.rng.draw import pack
from zo_hf.rng.philox import philox4x32
from zo_hf.rng.philox_wide import philox_blocks

WORD = st.integers(0, 2**32 - 1)
COUNTER = st.tuples(WORD, WORD, WORD, WORD)


def philox_on_integers(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as its paper's figure 2 draws it: two multiplications and a swap per round."""
    left, right = list(counter[0::2]), list(counter[1::2])
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(left[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(left[1] * 0xCD9E8D57, 1 << 32)
        left, right = [high1 ^ right[0] ^ k0, high0 ^ right[1] ^ k1], [low1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return left[0], right[0], left[1], right[1]


def philox(counters: list[tuple[int, int, int, int]], key: int) -> list[tuple[int, ...]]:
    words = philox4x32(tuple(torch.tensor(word) for word in zip(*counters, strict=True)), key)
    return list(zip(*(word.tolist() for word in words), strict=True))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    k0, k1 = words(key)
    assert philox([words(counter)], k0 | k1 << 32) == [words(expected)]
    assert philox_on_integers(words(counter), (k0, k1)) == words(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(COUNTER, min_size=1, max_size=20), WORD, WORD)
def test_agrees_with_python_integers(counters: list[tuple[int, int, int, int]], k0: int, k1: int) -> None:
    assert philox(counters, k0 | k1 << 32) == [philox_on_integers(counter, (k0, k1)) for counter in counters]


def test_leaves_its_counter_alone() -> None:
    """The rounds work in place, on copies: callers keep their counters between draws."""
    counter = tuple(torch.arange(5) + i for i in range(4))
    before = [word.clone() for word in counter]
    philox4x32(counter, 7)
    assert all(torch.equal(word, old) for word, old in zip(counter, before, strict=True))


def test_few_kernels_give_the_same_words() -> None:
    """The variant for devices with launches, for several keys at once."""
    generator = torch.Generator().manual_seed(0)
    words = tuple(torch.randint(0, 2**32, (50,), generator=generator) for _ in range(4))
    keys = [0xDEADBEEFCAFEBABE, 7, 2**64 - 1]
    before = [word.clone() for word in words]
    blocks = philox_blocks(torch.stack((words[0], words[2])), torch.stack((words[3], words[1])), keys)
    for key, found in zip(keys, blocks, strict=True):
        assert torch.equal(found, pack(philox4x32(words, key)))
    assert all(torch.equal(word, old) for word, old in zip(words, before, strict=True))
