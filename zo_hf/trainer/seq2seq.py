"""`ZOSeq2SeqTrainer`: a `ZOTrainer` that can evaluate with generated text, for encoder-decoder models."""

from __future__ import annotations

from transformers import Seq2SeqTrainer

from zo_hf.trainer.trainer import ZOTrainer


class ZOSeq2SeqTrainer(Seq2SeqTrainer, ZOTrainer):
    """`transformers.Seq2SeqTrainer` with the backward pass replaced by forward passes; see `ZOTrainer`."""
