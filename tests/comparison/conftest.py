from tests.tasks.conftest import model, model_folder, tokenizer

__all__ = ["model", "model_folder", "tokenizer"]
