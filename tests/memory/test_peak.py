import time
from pathlib import Path

import psutil
import pytest
import torch

from zo_hf.memory import peak
from zo_hf.memory.peak import SAMPLE_SECONDS, PeakMemory

ALLOCATED_MIB = 200


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the resident set")
def test_the_peak_of_a_phase_is_not_carried_into_the_next() -> None:
    with PeakMemory() as large:
        block = torch.ones(ALLOCATED_MIB * 2**20, dtype=torch.uint8)
        time.sleep(5 * SAMPLE_SECONDS)
        del block
    with PeakMemory() as small:
        time.sleep(5 * SAMPLE_SECONDS)
    assert 0 < small.mib < large.mib - 0.9 * ALLOCATED_MIB


@pytest.mark.skipif(not peak.PAGES.exists(), reason="needs /proc")
def test_the_system_says_what_psutil_says() -> None:
    assert peak.resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the resident set")
def test_without_either_the_refusal_comes_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak, "PAGES", tmp_path / "missing")
    assert peak.resident_bytes() > 0, "psutil is installed"
    monkeypatch.setattr(peak, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^the memory of a process is read by psutil .*`pip install psutil`\.$"):
        PeakMemory()


def test_the_sampler_ends_with_an_error_in_the_phase() -> None:
    memory = PeakMemory()
    with pytest.raises(RuntimeError, match="stop"), memory:
        raise RuntimeError("stop")
    assert not memory._thread.is_alive()
