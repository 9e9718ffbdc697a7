"""The tests; without a network, also where nobody has said so: huggingface_hub reads this when it is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
