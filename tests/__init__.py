"""The tests; without a network, also where nobody has said so: huggingface_hub reads this when it is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU, kernels run in Triton's interpreter, which has to be chosen before anything imports Triton.
if os.environ.get("ZO_HF_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
