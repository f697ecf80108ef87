"""Memory and weights that every block of the CPU worker is made with, and the steps that many of them share."""

from __future__ import annotations

from typing import Final, Protocol

import attrs

from mer.compute.cpu.matrix import Activations, Matrix, float_stride, multiply
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits, Scratch
from mer.compute.cpu.weights import DenseWeights
from mer.compute.kernels.elementwise import add_bias, add_rows, fill_rows, rms_norm
from mer.model.operators import Addition, Linear, Norm

NO_EPS: Final = 0.0  # of an addition without a norm


class Block(Protocol):
    """The steps of one operator of one layer."""

    def add(self, program: Program, n: int, n_blocks: int) -> None:
        """Add the steps for n tokens whose sequences have tables of so many KV blocks; they end with a barrier."""


@attrs.frozen(eq=False)
class Workspace:
    """Memory and weights of one worker."""

    limits: Limits
    scratch: Scratch
    weights: DenseWeights
    d_model: int

    def matrix(self, linear: Linear) -> Matrix:
        """Return the weights of a linear map."""
        return self.weights.matrix(linear.weight.name)

    def seed(self, program: Program, linear: Linear, n: int, out: int, *, add: bool = False) -> None:
        """Add the step that writes a linear map's bias where its product is to be added, if it has one.

        With `add`, the bias is added to what is there, as the product is. A barrier must stand between the two. The
        product adds, instead of a step after it adding the bias, because the steps before it wait at a barrier anyway.
        """
        if linear.bias is not None:
            bias = self.weights.vector(linear.bias.name)
            step = add_bias if add else fill_rows
            program.add(step.row(out=out, stride=float_stride(linear.rows), n=n, bias=bias))

    def multiply(
        self, program: Program, linear: Linear, x: Activations, out: int, *, add: bool = False, seeded: bool = False
    ) -> None:
        """Add the step out[t] = linear(x[t]) for all rows of x, or out[t] += linear(x[t]) with `add`.

        With `seeded`, a bias has been put there with `seed`. Without it a bias is an error, and not left out.
        """
        if linear.bias is not None and not seeded:
            raise RuntimeError(f"the CPU worker has no step for {linear.bias.name} yet: seed it before its product")
        add = add or linear.bias is not None
        multiply(program, self.matrix(linear), x, out, float_stride(linear.rows), self.limits.threads, add=add)

    def norm(self, program: Program, norm: Norm, x: int, n: int, out: int, *, index: int = 0) -> None:
        """Add the step out[t] = norm(x[t]) for n rows of D float32, or for those that an index of int32 names."""
        d_model = norm.weight.shape[0]
        stride, weight = float_stride(d_model), self.weights.vector(norm.weight.name)
        program.add(
            rms_norm.row(
                x=x,  # [T, D]
                x_stride=stride,
                index=index,  # [N], or 0: all of x
                n=n,
                d=d_model,
                weight=weight,  # [D]
                eps=self.scratch.constant(norm.eps),
                out=out,  # [N, D]
                out_stride=stride,
            )
        )

    def add(self, program: Program, addition: Addition, x: int, n: int, y: int) -> None:
        """Add the step x = (x + norm(y)) * scale for n rows of D float32, which normalizes y in place."""
        norm, scale = addition.norm, addition.scale
        program.add(
            add_rows.row(
                x=x,  # [T, D]
                stride=float_stride(self.d_model),
                n=n,
                d=self.d_model,
                y=y,  # [T, D]
                norm=0 if norm is None else self.weights.vector(norm.weight.name),  # [D]
                eps=self.scratch.constant(NO_EPS if norm is None else norm.eps),
                scale=0 if scale is None else self.weights.vector(scale.name),  # [1]
            )
        )


def addition_areas(addition: Addition, d_model: int, limits: Limits) -> Areas:
    """Return what the result of half a layer needs before it is added to x."""
    if addition.plain:
        return Areas({})
    eps = NO_EPS if addition.norm is None else addition.norm.eps
    return Areas({"half": limits.batch_tokens * float_stride(d_model)}, constants=(eps,))
