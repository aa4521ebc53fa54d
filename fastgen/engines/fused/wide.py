"""FusedOps for many rows: products by cuBLAS through torch, the rest by kernels of our own."""

import torch

from fastgen.engines import NotFused
from fastgen.engines.fused.ops import FusedOps
from fastgen.engines.fused.products import ACTIVATIONS
from fastgen.engines.fused.values import ActivateArgs, Normed, Product

MAX_ROWS = 512
_THREADS = 256


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
        weight, scale, addmm = product.weight, product.scale, torch.ops.aten.addmm
        if weight.dtype not in (torch.float32, self._dtype) or y.dtype.itemsize < weight.itemsize:
            raise NotFused(f"weights in {weight.dtype}, activations in {self._dtype}")
        rows, bias = x, None if product.bias is None else product.bias.flatten()
        if x.dtype != weight.dtype:
            rows = self._buffer("float32", x.shape[1], weight.dtype)
        factor = weight if product.across else weight.T
        inside = beta == 0.0 and y.dtype == weight.dtype  # then cuBLAS adds the bias

        def launch(stream: int) -> None:
            if rows is not x:
                rows.copy_(x)
            if inside and bias is not None:
                torch.addmm(bias, rows, factor, alpha=scale, out=y)
            elif y.dtype == weight.dtype:
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
