"""FusedOps for many rows: products by cuBLAS through torch, the rest by kernels of our own."""

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.products import ACTIVATIONS
from fastgen.engines.fused.values import (
    ActivateArgs,
    DequantiseArgs,
    Matrix,
    Normed,
    Product,
    pointer,
)

MAX_ROWS = 512
_THREADS = 256
_PIECE = 16  # inputs that a thread dequantises
_SCRATCH = 2**24  # elements that are dequantised at a time


class WideOps(FusedOps):
    """A step of more rows than a tensor core product has; as ``FusedOps`` otherwise."""

    @property
    def _tile_rows(self) -> int:
        return 1  # no kernel here depends on the number of rows: one program serves all

    def _linear(
        self, y: torch.Tensor, products: list[Product], epilogue: str, activation: str = "relu"
    ) -> None:
        x = products[0].x
        if isinstance(x, Normed):
            x = self._norm(x, products[0].sizes[0])
        if epilogue == "STORE":
            for product, outputs in zip(products, self._parts(y, products), strict=True):
                self._product(outputs, x, product)
        elif epilogue == "ADD":
            self._product(y, x, products[0], beta=1.0)
        else:
            self._activated(y, x, products, activation)

    def _parts(self, y: torch.Tensor, products: list[Product]) -> tuple[torch.Tensor, ...]:
        return y.view(self._rows, -1).split([p.sizes[1] for p in products], dim=1)

    def _product(
        self, y: torch.Tensor, x: torch.Tensor, product: Product, beta: float = 0.0
    ) -> None:
        """Queue ``y = product + beta * y``, summed in float32 whatever y's dtype."""
        matrix, scale = product.weight, product.scale
        bias = None if product.bias is None else product.bias.flatten()
        if matrix.blocks is None:
            factor = matrix.values if matrix.across else matrix.values.T
            self._multiplied(y, x, factor, bias, scale, beta)
            return
        each = max(1, _SCRATCH // matrix.sizes[0])
        for first in range(0, matrix.sizes[1], each):
            some = slice(first, first + each)
            weight = self._dequantised(matrix, some)
            part = None if bias is None else bias[some]
            self._multiplied(y.view(self._rows, -1)[:, some], x, weight.T, part, scale, beta)

    def _dequantised(self, matrix: Matrix, some: slice) -> torch.Tensor:
        """Launch what gives some outputs of a weight of fewer bits as numbers [out, in]."""
        assert matrix.blocks is not None
        values, scales = matrix.values[some], matrix.blocks.scales[some]
        zeros = None if matrix.zeros is None else matrix.zeros[some]
        inputs, outputs = matrix.sizes[0], len(values)
        if (key := ("dequantised", inputs * outputs)) not in self._scratch:
            self._scratch[key] = torch.empty(
                inputs * outputs, dtype=self._dtype, device=self.device
            )
        weight = self._scratch[key].view(outputs, inputs)
        for tensor in (values, scales) if zeros is None else (values, scales, zeros):
            self.made[f"at {tensor.data_ptr()}"] = tensor
        pointers = values.data_ptr(), scales.data_ptr(), pointer(zeros), weight.data_ptr()
        args = DequantiseArgs(*pointers, outputs)
        blocks = -(-outputs * -(-inputs // _PIECE) // _THREADS)
        self._launch(f"dequantise<{matrix.element}, {inputs}>", (blocks, 1), _THREADS, args)
        return weight

    def _multiplied(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        factor: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        beta: float,
    ) -> None:
        """Queue ``y = scale * x @ factor + bias + beta * y``."""
        rows, dtype, addmm = x, factor.dtype, torch.ops.aten.addmm
        if y.dtype.itemsize < dtype.itemsize:
            raise NotFused(f"weights in {dtype}, activations in {self._dtype}")
        if x.dtype != dtype:
            rows = self._buffer("float32", x.shape[1], dtype)
        inside = beta == 0.0 and y.dtype == dtype  # then cuBLAS adds the bias

        def launch(stream: int) -> None:
            if rows is not x:
                rows.copy_(x)
            if inside and bias is not None:
                torch.addmm(bias, rows, factor, alpha=scale, out=y)
            elif y.dtype == dtype:
                torch.addmm(y, rows, factor, beta=beta, alpha=scale, out=y)
            else:
                addmm.dtype_out(y, rows, factor, y.dtype, beta=beta, alpha=scale, out=y)
            if bias is not None and not inside:
                y.add_(bias)

        self.launches.append(launch)

    def _activated(
        self, y: torch.Tensor, x: torch.Tensor, products: list[Product], activation: str
    ) -> None:
        names = ("product", "gate")[: len(products)]
        outputs = [self._buffer(name, y.shape[1]) for name in names]
        for product, output in zip(products, outputs, strict=True):
            self._product(output, x, product)
        args = ActivateArgs(x=outputs[0].data_ptr(), y=y.data_ptr(), count=y.numel())
        args.gate = outputs[-1].data_ptr()
        body = f"activation<{ACTIVATIONS[activation]}, {str(len(products) > 1).lower()}>"
        self._launch(body, (-(-y.numel() // (8 * _THREADS)), 1), _THREADS, args)
