from __future__ import annotations

from typing import Any

import pytest

from tests.trl.toys import toy_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer()
