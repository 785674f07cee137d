"""Make a torch model 4-bit.

How to choose: `best()`, unless a paper is to be reproduced. `rtn()` needs no data; `smoothquant_plus()` is quick and
leaves plain round-to-nearest behind; `duquant()` and `svdquant()` round activations too, the latter takes adapters;
`gptq()` and `awq()` are there to compare with.
"""

from collections.abc import Callable

from planish.quant.act_formats import Dual, Static
from planish.quant.candidates import search
from planish.quant.checkpoint import inspect, load, round_kept, save
from planish.quant.conv import QConv
from planish.quant.decoder import Decoder
from planish.quant.disk import SafetensorsWeights, assemble, open_model
from planish.quant.engine import Method, quantize
from planish.quant.evaluation import Evaluation, compare, evaluate
from planish.quant.formats import FP4, Affine, Format, QTensor
from planish.quant.journal import Journal
from planish.quant.layers import QLinear
from planish.quant.low_rank import LowRank
from planish.quant.methods.awq import awq
from planish.quant.methods.best import best
from planish.quant.methods.duquant import duquant
from planish.quant.methods.evol_q import Evolve, evol_q, evolve
from planish.quant.methods.gptq import gptq
from planish.quant.methods.nipq import nipq
from planish.quant.methods.rtn import rtn
from planish.quant.methods.segquant import segquant
from planish.quant.methods.smoothquant_plus import smoothquant_plus
from planish.quant.methods.svdquant import svdquant
from planish.quant.parts import Segments
from planish.quant.report import Report
from planish.quant.segmenting import Segmented
from planish.quant.segments import Cuts, Segment, detect_segments
from planish.quant.transcode import export

METHODS: dict[str, Callable[..., Method]] = {
    "rtn": rtn,
    "awq": awq,
    "gptq": gptq,
    "smoothquant+": smoothquant_plus,
    "nipq": nipq,
    "best": best,
    "duquant": duquant,
    "svdquant": svdquant,
    "segquant": segquant,
    "evol-q": evol_q,
}
"""Presets by name; each can be called without arguments."""

__all__ = [
    "FP4",
    "METHODS",
    "Affine",
    "Cuts",
    "Decoder",
    "Dual",
    "Evaluation",
    "Evolve",
    "Format",
    "Journal",
    "LowRank",
    "Method",
    "QConv",
    "QLinear",
    "QTensor",
    "Report",
    "SafetensorsWeights",
    "Segment",
    "Segmented",
    "Segments",
    "Static",
    "assemble",
    "awq",
    "best",
    "compare",
    "detect_segments",
    "duquant",
    "evaluate",
    "evol_q",
    "evolve",
    "export",
    "gptq",
    "inspect",
    "load",
    "nipq",
    "open_model",
    "quantize",
    "round_kept",
    "rtn",
    "save",
    "search",
    "segquant",
    "smoothquant_plus",
    "svdquant",
]
