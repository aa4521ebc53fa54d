"""Graph modules shared by families; parameter names are those of torch.nn and Hugging Face."""

from onnxscript import nn

from fastgen.ops.standard import Ops
from fastgen.ops.values import Value


class Named(nn.Module):
    """Submodules under their names."""

    def __init__(self, /, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class Linear(nn.Module):
    """torch.nn.Linear, without bias unless said."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter([out_features, in_features])
        self.bias = nn.Parameter([out_features]) if bias else None

    def forward(self, op: Ops, x: Value, scale: float = 1.0) -> Value:
        return op.linear(x, self.weight, self.bias, scale)


class WideLinear(Linear):
    """A Linear without bias whose result may exceed float16's range."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, op: Ops, x: Value, scale: float = 1.0) -> Value:
        return op.wide_linear(x, self.weight)


class Conv1D(nn.Module):
    """transformers' Conv1D: a Linear whose weight is [in, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter([in_features, out_features])
        self.bias = nn.Parameter([out_features])

    def forward(self, op: Ops, x: Value) -> Value:
        return op.linear(x, self.weight, self.bias, transposed=True)


class Embedding(nn.Module):
    """torch.nn.Embedding of token ids or positions, times ``scale``; that of id 0 may lie behind
    ``offset`` others."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, scale: float = 1.0, offset: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter([num_embeddings + offset, embedding_dim])
        self.scale, self.offset = scale, offset

    def forward(self, op: Ops, ids: Value) -> Value:
        return op.embedding(ids, self.weight, self.scale, self.offset)


class RMSNorm(nn.Module):
    """Adds what a sublayer computed to the residual stream, then norms the sum."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter([width])
        self.eps = eps

    def forward(self, op: Ops, residual: Value, delta: Value | None) -> tuple[Value, Value]:
        """Give the new residual and its norm; ``delta`` None means nothing to add yet."""
        if delta is None:
            return residual, op.rms_norm(residual, self.weight, self.eps)
        return op.add_rms_norm(residual, delta, self.weight, self.eps)


class LayerNorm(nn.Module):
    """As RMSNorm, with mean and bias: torch.nn.LayerNorm of the residual stream."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter([width])
        self.bias = nn.Parameter([width])
        self.eps = eps

    def forward(self, op: Ops, residual: Value, delta: Value | None) -> tuple[Value, Value]:
        """Give the new residual and its norm; ``delta`` None means nothing to add yet."""
        if delta is None:
            return residual, op.layer_norm(residual, self.weight, self.bias, self.eps)
        return op.add_layer_norm(residual, delta, self.weight, self.bias, self.eps)
