"""The options with which every job loads its model."""

from dataclasses import dataclass, field, fields

from zo_hf.method_info import Choice, Whole, checked
from zo_hf.trainer.argument_values import values_of_type


@dataclass
class ModelArguments:
    """The model of a job, its format, and its adapter.

    Raises:
        ValueError: an option has a wrong value, or does not go with another.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a causal language model: hub name or folder"}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the weights", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "quantize the model's linear layers to int8 (bitsandbytes)"}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "quantize the model's linear layers to nf4 (bitsandbytes)"}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "also quantize the scales of nf4"})
    use_peft: bool = field(
        default=False, metadata={"help": "train a LoRA adapter of PEFT; the weights of the base model do not change"}
    )
    lora_r: int = field(default=8, metadata={"help": "rank of the LoRA adapter"})
    lora_alpha: int = field(default=16, metadata={"help": "alpha of the LoRA adapter; its scale is alpha / rank"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "endings of the names of the layers with an adapter"}
    )
    offline: bool = field(default=False, metadata={"help": "never contact the hub"})

    def __post_init__(self) -> None:
        for part in fields(self):
            value, choices = getattr(self, part.name), part.metadata.get("choices")
            if value is None and part.default is None:  # HfArgumentParser takes None out of the types
                continue
            values = Choice(tuple(choices)) if choices is not None else values_of_type(part.type)
            if part.type is int:
                values = Whole(1)
            assert values is not None, part
            setattr(self, part.name, checked(f"--{part.name}", value, values, "leave it out for the default"))
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit are two formats; give one of them.")
        if self.use_bnb_nested_quant and not self.load_in_4bit:
            raise ValueError("--use_bnb_nested_quant quantizes the scales of 4-bit layers; also give --load_in_4bit.")
