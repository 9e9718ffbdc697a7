"""A pretrained sentence encoder, all its weights, learns sentiment from forward passes.

MeZO's own finding is that a random head does not train this way and a prompt does. So the classifier compares a sentence
with the embeddings of two phrases, as users of sentence embeddings do without any training, and training starts from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from zo_hf import ZOConfig, ZOTrainer
from zo_hf.tasks import assets
from zo_hf.tasks.data import embedded_reviews

PHRASES = ["negative review", "positive review"]
SCALE = 20  # of a cosine similarity, to make it a logit


class SimilarityClassifier(nn.Module):
    """Logits are similarities to the phrases' embeddings as they were before training."""

    def __init__(self, encoder: nn.Module, phrases: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            self.register_buffer("phrases", self.embed(**phrases))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """ids: (rows, length) -> (rows, hidden), the mean over tokens, of length one."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = SCALE * self.embed(input_ids, attention_mask) @ self.get_buffer("phrases").t()
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.slow
def test_minilm_learns_sentiment(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    sentences = embedded_reviews(num_train=3000, num_held_out=400, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    encoder = AutoModel.from_pretrained(assets.minilm(), add_pooling_layer=False).eval()
    model = SimilarityClassifier(encoder, tokenizer(PHRASES, return_tensors="pt", return_token_type_ids=False))

    def encoded(part: Any) -> Any:
        options = {"truncation": True, "max_length": 48, "return_token_type_ids": False}
        return part.map(lambda rows: tokenizer(rows["text"], **options), batched=True)

    options = {"learning_rate": 1e-4, "lr_scheduler_type": "linear", "max_steps": 300}
    options |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 100, "dataloader_pin_memory": False}
    options |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    options |= {"zo_rows_per_direction": 0}  # the rate was chosen for one direction
    trainer = ZOTrainer(
        model,
        ZOConfig(str(tmp_path), **options),
        train_dataset=encoded(sentences.train),
        eval_dataset=encoded(sentences.held_out),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    assert 0.6 < before["eval_accuracy"] < 0.7, "without training"
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] >= before["eval_accuracy"] + 0.03
    assert after["eval_loss"] < before["eval_loss"]
