"""Layers of formats that need a GPU or another library: their real classes or attributes, with a forward that decodes.

FP8 (fine-grained and FBGEMM) and EETQ are transformers' own classes, of which only the forward is replaced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.integrations.eetq import EetqLinear
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.finegrained_fp8 import FP8Linear

from tests.conftest import seeded, tiny_llama


class FineGrainedFP8(FP8Linear):
    """FP8 with a scale for every block of 32 x 32, as checkpoints of DeepSeek and Qwen have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features, linear.out_features, block_size=(32, 32), has_bias=linear.bias is not None
        )
        weight = linear.weight.detach()
        self.weight_scale_inv.data.fill_(float(weight.abs().max()) / 448)
        self.weight.data = (weight / self.weight_scale_inv[0, 0]).to(torch.float8_e4m3fn)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        m, n = self.weight.shape
        scales = self.weight_scale_inv.repeat_interleave(32, 0)[:m].repeat_interleave(32, 1)[:, :n]
        return nn.functional.linear(x, (self.weight.float() * scales).to(x.dtype), self.bias)


class RowwiseFP8(FbgemmFp8Linear):
    """FP8 with a scale for every row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weight = linear.weight.detach()
        self.weight_scale.data = weight.abs().amax(1, keepdim=True) / 448
        self.weight.data = (weight / self.weight_scale).to(torch.float8_e4m3fn)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype), self.bias)


class CompressedFP8(nn.Linear):
    """FP8 as compressed-tensors has it: a Linear with a scale beside its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale, self.bias = nn.Parameter(scale), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype), self.bias)


class Eetq(EetqLinear):
    """EETQ's int8, (in, out), with trainable scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight = linear.weight.detach()
        self.weight_scales.data = (weight.abs().amax(1) / 127).to(torch.float16)
        self.weight.data = (weight / self.weight_scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8).t()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t().float() * self.weight_scales.float()[:, None]
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


class Awq(nn.Module):
    """AWQ's int4 as AutoAWQ's WQLinear has it: codes, zero points and scales in buffers, none in parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = (weight.amax(1) - weight.amin(1)) / 15
        zeros = (-weight.amin(1) / scales).round()
        codes = ((weight / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
        self.register_buffer("qweight", codes.to(torch.int32).t().contiguous())
        self.register_buffer("qzeros", zeros.to(torch.int32))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.qweight.t() - self.qzeros[:, None]) * self.scales[:, None]
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


class PackedExperts(nn.Module):
    """MXFP4's experts: packed codes of three dimensions in a module that is no linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        step = float(linear.weight.detach().abs().max()) / 127
        codes = (linear.weight.detach() / step).round() + 128
        self.down_proj = nn.Parameter(codes.to(torch.uint8)[None], requires_grad=False)
        self.down_proj_scales = nn.Parameter(torch.full((1, 1, 1), step))
        self.down_proj_bias = nn.Parameter(torch.zeros(1, linear.out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.down_proj[0].float() - 128) * self.down_proj_scales[0]
        return nn.functional.linear(x, weight.to(x.dtype), self.down_proj_bias[0].to(x.dtype))


FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "fine-grained FP8": FineGrainedFP8,
    "FBGEMM's FP8": RowwiseFP8,
    "compressed-tensors' FP8": CompressedFP8,
    "EETQ": Eetq,
    "AWQ": Awq,
    "experts": PackedExperts,
}
#: Formats around which PEFT puts an adapter by itself.
WRAPPED = ("fine-grained FP8", "FBGEMM's FP8", "compressed-tensors' FP8")


def model_in(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny Llama with all linear layers in a format, except the head; marked as transformers marks what it quantizes."""
    model = seeded(tiny_llama, dtype, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    for name, module in list(model.named_modules()):
        chosen = name.endswith("down_proj") if kind == "experts" else module is not model.lm_head
        if isinstance(module, nn.Linear) and chosen:
            model.set_submodule(name, FORMATS[kind](module))
    model.is_quantized, model.hf_quantizer = True, None
    return model


def coded_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the codes, scales and zero points of all layers, by their names without those that PEFT adds."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(FORMATS.values()))}
    return {
        f"{name}.{part}".replace("base_model.model.", "").replace(".base_layer", ""): tensor.detach().clone()
        for name, layer in layers.items()
        for part, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        if part != "bias"
    }
