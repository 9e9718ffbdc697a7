"""TRL's losses read the weight of the head themselves, so the head of an offloaded model stays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import assert_same_bits
from tests.offload.models import values_of
from tests.trl.toys import READY, config, folder_of, lines_of, toy_tokenizer
from zo_hf import forward_only

trl = pytest.importorskip("trl")

IN_MEMORY = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


def trainer_of(name: str, folder: Path, device_map: dict[str, str] | None) -> Any:
    tokenizer, (data, options) = toy_tokenizer(), READY[name]
    path = folder_of(name, folder, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=str(folder / "offload"))
    kind, made = forward_only(getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"))
    args = config(made, folder, zo_fold_steps=1, **options)
    return kind(model, args=args, train_dataset=data(), processing_class=tokenizer)


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_a_head_on_the_disk_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^TRL's losses read lm_head\.weight .* device_map, and offload only the layers\.$"
    ):
        trainer_of(name, tmp_path, {"": "disk"})


def test_layers_on_the_disk_train_with_the_bits_of_layers_in_memory(tmp_path: Path) -> None:
    ends = []
    for folder, device_map in (("memory", None), ("disk", IN_MEMORY | {"model.layers": "disk"})):
        trainer = trainer_of("SFT", tmp_path / folder, device_map)
        trainer.train()
        ends.append(([line["loss"] for line in lines_of(trainer)], values_of(trainer.model)))
    assert ends[0][0] == ends[1][0]
    assert_same_bits(ends[1][1], ends[0][1])
