"""The imports of a training process, which take ten seconds: a server makes them once and forks every process."""

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
from transformers import BertForSequenceClassification, OPTForCausalLM  # noqa: F401

import zo_hf.trajectory  # noqa: F401
