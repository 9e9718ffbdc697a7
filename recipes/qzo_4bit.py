# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,quantization]"]
# ///
"""Tune the quantisation scales of a 4-bit model with forward passes only: QZO (arXiv 2505.13430).

    accelerate launch recipes/qzo_4bit.py --model_name_or_path meta-llama/Llama-3.1-8B --dtype bfloat16
    accelerate launch recipes/qzo_4bit.py --offline        the embedded SmolLM2-135M
    python recipes/qzo_4bit.py --help                      every option, the trainer's included

The codes never change; each block of 64 weights has one scale, whose logarithm moves. The result is a 4-bit model like the
one that was loaded. The settings are in qzo_4bit.yaml beside this file; copy it, change it and name it with --config. The
command line wins.
"""

from pathlib import Path

from zo_hf.tasks.sentiment_job import main

if __name__ == "__main__":
    main(config_file=Path(__file__).with_suffix(".yaml"), description=__doc__)
