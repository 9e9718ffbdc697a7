# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo,quantization]"]
# ///
"""Tune the quantization scales of a 4-bit model with forward passes only: QZO (arXiv 2505.13430).

    accelerate launch recipes/qzo_4bit.py --model_name_or_path meta-llama/Llama-3.1-8B --dtype bfloat16
    accelerate launch recipes/qzo_4bit.py --offline        the embedded SmolLM2-135M
    python recipes/qzo_4bit.py --help                      all options, including those of the trainer

Each block of 64 weights has one scale, whose logarithm moves; the codes never change. The result is a 4-bit model in
the format of the one that was loaded. The settings are in qzo_4bit.yaml next to this file. To change them, copy that
file and pass the copy with --config, or give options on the command line, which override the file.
"""

from pathlib import Path

from zo_hf.tasks.sentiment_job import main

if __name__ == "__main__":
    main(config_file=Path(__file__).with_suffix(".yaml"), description=__doc__)
