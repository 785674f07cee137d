"""Make a torch model 4-bit."""

from planish.quant.engine import Method, quantize
from planish.quant.evaluation import Evaluation, compare, evaluate
from planish.quant.formats import FP4, Affine, Dual, Format, QTensor
from planish.quant.layers import QLinear
from planish.quant.methods.rtn import rtn
from planish.quant.report import Report

__all__ = [
    "FP4",
    "Affine",
    "Dual",
    "Evaluation",
    "Format",
    "Method",
    "QLinear",
    "QTensor",
    "Report",
    "compare",
    "evaluate",
    "quantize",
    "rtn",
]
