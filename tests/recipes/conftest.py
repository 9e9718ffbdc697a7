from pathlib import Path
from types import ModuleType

import pytest
from transformers import PreTrainedTokenizerFast

from tests.comparison.conftest import losses
from tests.conftest import seeded, tiny_bert
from tests.recipes.recipe_module import recipe_module
from tests.tasks.conftest import model, model_folder, tokenizer

__all__ = ["encoder_folder", "losses", "model", "model_folder", "tokenizer"]


@pytest.fixture(scope="module")
def recipe(request: pytest.FixtureRequest) -> ModuleType:
    """The recipe that the file of the tests is named after."""
    return recipe_module(request.path.stem.removeprefix("test_"))


@pytest.fixture
def encoder_folder(model_folder: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """A saved encoder without a head, beside the sentences of `model_folder`."""
    folder = tmp_path / "encoder"
    seeded(tiny_bert, vocab_size=len(tokenizer)).bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
