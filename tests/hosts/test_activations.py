"""Units go where activations go: compilers, exporters, tracers, and the tables of other libraries."""

import pytest
import torch
from torch import nn

from planish.nn import SAU, SMU, SMU1, ReQU

UNITS = [
    lambda: SAU(sigma=0.5, learn_sigma=True),
    lambda: SAU(4, kernel="student"),
    lambda: SMU(mu=1.0),
    SMU1,
    ReQU,
]
NAMES = ["SAU", "SAU channels", "SMU", "SMU1", "ReQU"]


def net(unit):
    return nn.Sequential(nn.Linear(3, 4), unit(), nn.Linear(4, 2))


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_compiles_as_one_graph(unit, unchecked):
    model, x = net(unit), torch.randn(5, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for f in (model, compiled):
        model.zero_grad()
        y = f(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, graph in zip(*found, strict=True):
        assert torch.allclose(eager, graph, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS, ids=NAMES)
def test_exports(unit, unchecked):
    model, x = net(unit).eval(), torch.randn(5, 3)
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=(rows,))
    more = torch.randn(9, 3)
    assert torch.allclose(program.module()(more), model(more), atol=1e-6)


def test_runs_as_onnx(unchecked, tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    for unit in UNITS:
        model, x = net(unit).eval(), torch.randn(5, 3)
        path = tmp_path / "net.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        (y,) = reference.ReferenceEvaluator(str(path)).run(None, {"input": x.numpy()})
        assert torch.allclose(torch.from_numpy(y), model(x), atol=1e-5)


def test_is_a_leaf_for_symbolic_tracing():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, SAU) or super().is_leaf_module(m, name)

    model = net(SAU)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(5, 3)
    assert torch.equal(traced(x), model(x))


def test_the_table_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    activations.ACT2FN["sau"] = SAU
    try:
        assert isinstance(activations.ACT2FN["sau"], SAU)
    finally:
        del activations.ACT2FN["sau"]
