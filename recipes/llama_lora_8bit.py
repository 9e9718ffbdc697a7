# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft,quantization]"]
# ///
"""Train a LoRA adapter over an 8-bit model with forward passes only. Any causal language model will do:

    accelerate launch recipes/llama_lora_8bit.py --model_name_or_path meta-llama/Llama-3.1-8B --dtype bfloat16
    accelerate launch recipes/llama_lora_8bit.py --offline        the embedded SmolLM2-135M, of Llama's architecture
    python recipes/llama_lora_8bit.py --help                      every option, the trainer's included

The 8-bit weights are only ever read, once for both probes of a step. The adapter is saved in PEFT's format. The settings
are in llama_lora_8bit.yaml beside this file; copy it, change it and name it with --config. The command line wins.
"""

from pathlib import Path

from zo_hf.tasks.sentiment_job import main

if __name__ == "__main__":
    main(config_file=Path(__file__).with_suffix(".yaml"), description=__doc__)
