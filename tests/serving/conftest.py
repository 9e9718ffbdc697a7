import pytest

pytest.importorskip("peft")
