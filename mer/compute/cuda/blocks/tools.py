"""Weights and products that every block on the device is made with."""

from __future__ import annotations

import attrs
import torch
from torch.nn import functional

from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.weights import DeviceWeights
from mer.model.operators import Addition, Linear, Norm

Tensor = torch.Tensor


@attrs.frozen(eq=False)
class Tools:
    """Weights and products of one worker."""

    weights: DeviceWeights
    kernels: TorchKernels

    def linear(self, linear: Linear, x: Tensor, *, exact: bool = False) -> Tensor:
        """Return what a linear map gives for x [T, cols]; `exact`: in float32, whatever the products are made in."""
        out = self.kernels.matmul(self.weights.matrix(linear.weight.name), x, exact=exact)
        return out if linear.bias is None else out + self.weights.vector(linear.bias.name)

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """Return x normalized along its last axis."""
        return functional.rms_norm(x, (x.shape[-1],), self.weights.vector(norm.weight.name), norm.eps)

    def added(self, addition: Addition, x: Tensor, y: Tensor) -> Tensor:
        """Return the residual stream x [T, D] after half a layer that gives y."""
        total = x + (y if addition.norm is None else self.norm(addition.norm, y))
        return total if addition.scale is None else total * self.weights.vector(addition.scale.name)
