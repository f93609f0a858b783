"""Linear layers over the int8 and int4 weights of the published quantised checkpoints."""

import torch
from torch import nn


def packed_weight(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 values [out, in] as stored, [out, in * bits / 8]: of two 4-bit values the even column is the high half."""
    if bits == 8:
        return values
    even, odd = values.unflatten(-1, (-1, 2)).unbind(-1)
    return (even << 4) | (odd & 0xF)


def unpacked_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored weight [out, in * bits / 8] as int8 values [out, in]; int8 shifts to the right keep the sign."""
    if bits == 8:
        return weight
    return torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(-2)


class DequantizedMatmul(torch.autograd.Function):
    """x W^T that keeps the stored weight for the backward pass, not the two to four times larger dequantised one."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return nn.functional.linear(states, dequantized_weight(weight, scale, bits).to(states.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weight = dequantized_weight(*ctx.saved_tensors, ctx.bits)
        return gradient @ weight.to(gradient.dtype), None, None, None


def dequantized_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight [out, in] in the dtype of its scales [out]."""
    return unpacked_weight(weight, bits).to(scale.dtype) * scale[:, None]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with one scale per row; `bits` is 4 or 8, `bias` stays trainable.

    Raises ValueError for other `bits`, or where a row does not fill whole bytes.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = True):
        nn.Module.__init__(self)
        if bits not in (4, 8):
            raise ValueError(f"quantization_bit is {bits}; use 4, 8 or, for plain weights, 0.")
        if in_features * bits % 8:
            raise ValueError(f"Rows of {in_features} weights cannot be packed at 4 bits; use quantization_bit 8.")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        stored = torch.zeros(out_features, in_features * bits // 8, dtype=torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(out_features))  # no parameter: loading would make it trainable
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._is_hf_initialized = True  # the library's random initialisation cannot fill int8

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> "QuantizedLinear":
        """The quantised copy of a layer; each row's largest weight gets the largest value."""
        weight = linear.weight.detach()
        quantized = cls(linear.in_features, linear.out_features, bits, linear.bias is not None)
        quantized = quantized.to(weight.device, weight.dtype)
        scale = weight.abs().amax(dim=-1) / (2 ** (bits - 1) - 1)  # [out]
        nonzero = torch.where(scale == 0, 1, scale)
        quantized.weight_scale.copy_(scale)
        quantized.weight.copy_(packed_weight((weight / nonzero[:, None]).round().to(torch.int8), bits))
        if linear.bias is not None:
            quantized.bias.data.copy_(linear.bias.detach())
        return quantized

    def dequantized_weight(self) -> torch.Tensor:
        return dequantized_weight(self.weight, self.weight_scale, self.bits)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        outputs = DequantizedMatmul.apply(states, self.weight, self.weight_scale, self.bits)  # [.., out]
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


def linear(in_features: int, out_features: int, bias: bool, quantization_bit: int = 0) -> nn.Linear:
    """A layer as config.json's `quantization_bit` asks for."""
    if quantization_bit:
        return QuantizedLinear(in_features, out_features, quantization_bit, bias)
    return nn.Linear(in_features, out_features, bias)
