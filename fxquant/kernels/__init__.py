"""Operator schemas. Importing this package registers ``torch.ops.fxquant.*``."""

from fxquant.kernels.schema import NAMESPACE, OPERATORS, Operator, register

__all__ = ["NAMESPACE", "OPERATORS", "Operator", "register"]
