# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,peft,quantization]"]
# ///
"""Train a LoRA adapter on an 8-bit model with forward passes only. Any causal language model works:

    accelerate launch recipes/llama_lora_8bit.py --model_name_or_path meta-llama/Llama-3.1-8B --dtype bfloat16
    accelerate launch recipes/llama_lora_8bit.py --offline        the embedded SmolLM2-135M, of Llama's architecture
    python recipes/llama_lora_8bit.py --help                      all options, including those of the trainer

A step reads the 8-bit weights once for both probes, and never writes them. The adapter is saved in PEFT's format. The
settings are in llama_lora_8bit.yaml next to this file. To change them, copy that file and pass the copy with --config,
or give options on the command line, which override the file.
"""

from pathlib import Path

from zo_hf.tasks.sentiment_job import main

if __name__ == "__main__":
    main(config_file=Path(__file__).with_suffix(".yaml"), description=__doc__)
