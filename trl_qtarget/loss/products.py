"""The matrix products of the loss, with float32 results from half-precision inputs.

Rounding a product to half precision before it is summed biases training, so every product here accumulates in float32
(float64 for float64 inputs) and returns that type. CPUs round half-precision products, as torch has no other for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


FP16_GRADIENT_SCALE = 2.0**10  # float16 rounds numbers below 6e-8 to zero: most of a vocabulary's gradient


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which logits and gradients of `dtype` inputs are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precise(x: Tensor) -> Tensor:
    """`x` in the type of a token's numbers: float64, or float32 on Apple's devices, which lack float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class Head:
    """A language-model head: `logits = softcap * tanh(scale * (h W^T + b) / softcap)`; without softcap no tanh."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def to(self, dtype: torch.dtype) -> Head:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def first(self, columns: int) -> Head:
        """The head over its first columns only: a view."""
        bias = None if self.bias is None else self.bias[:columns]
        return replace(self, weight=self.weight[:columns], bias=bias)


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """The type in which a tile's gradient enters its two products: bfloat16 on CUDA, where they accumulate in float32.

    Gradients of float16 models stay float32, since float16 would round most of a vocabulary's gradient to zero.
    """
    return torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else wide(hidden.dtype)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a b`, accumulated in the type of `out` if the device can do so."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def project(hidden: Tensor, head: Head, out: Tensor) -> Tensor:  # (n, D), head, (n, V) wide -> out
    """Write `scale * (h W^T + b)` into `out`. Kernels apply the softcap later, to one block of rows at a time."""
    if head.bias is not None and hidden.dtype == out.dtype:
        torch.addmm(head.bias, hidden, head.weight.t(), out=out)
    else:
        multiply(hidden, head.weight.t(), out)
        if head.bias is not None:
            out += head.bias
    return out if head.scale == 1 else out.mul_(head.scale)


def hidden_gradient(gradient: Tensor, weight: Tensor, out: Tensor) -> None:  # (n, V), (V, D), (n, D) wide -> out
    """Write `G W` into `out`. The backward pass multiplies by the head's scale, together with the upstream scalar."""
    if weight.dtype != torch.float16:
        multiply(gradient.to(weight.dtype), weight, out)
    elif gradient.is_cuda:
        boost = FP16_GRADIENT_SCALE / gradient.abs().amax().clamp(min=1)  # a large weight must not overflow either
        multiply((gradient * boost).half(), weight, out)
        out.div_(boost)
    else:
        torch.mm(gradient, weight.to(gradient.dtype), out=out)  # a CPU would round float16 products to float16


def add_weight_gradient(
    gradient: Tensor,  # (n, V)
    hidden: Tensor,  # (n, D)
    out: Tensor,  # (V, D) wide
    first: bool,  # overwrite `out`, which spares filling (V, D) with zeros
) -> None:
    """`out += G^T h`, without the head's scale."""
    if gradient.dtype == out.dtype:
        torch.addmm(out, gradient.t(), hidden.to(out.dtype), beta=0 if first else 1, out=out)
    elif first:
        multiply(gradient.t(), hidden, out)
    else:
        torch.addmm(out, gradient.t(), hidden, out_dtype=out.dtype, out=out)
