"""Make a torch model 4-bit."""

from planish.quant.checkpoint import inspect, load, save
from planish.quant.disk import SafetensorsWeights, assemble, open_model
from planish.quant.engine import Method, quantize
from planish.quant.export import export
from planish.quant.formats import FP4, Affine, Dual, Format, QTensor
from planish.quant.journal import Journal
from planish.quant.layers import QLinear
from planish.quant.methods.rtn import rtn
from planish.quant.report import Report

__all__ = [
    "FP4",
    "Affine",
    "Dual",
    "Format",
    "Journal",
    "Method",
    "QLinear",
    "QTensor",
    "Report",
    "SafetensorsWeights",
    "assemble",
    "export",
    "inspect",
    "load",
    "open_model",
    "quantize",
    "rtn",
    "save",
]
