"""Layers with an activation format run on integers: what they compute, end to end and compiled."""

import copy

import pytest
import torch
from torch import nn

from planish import kernels
from planish.kernels import cpu
from planish.quant.formats import Affine
from planish.quant.layers import QLinear
from planish.quant.transforms import Chain, Permute, Rotate

ACTS = {
    "W4A8": Affine(8, None, symmetric=True, scale_dtype="float32"),
    "W4A8, grouped": Affine(8, 16),
    "W4A4": Affine(4, 16),
    "W4A4, clipped": Affine(4, None, clip=0.9),
    "W4A4, symmetric": Affine(4, None, symmetric=True, scale_dtype="bfloat16"),
}


class Small(nn.Module):
    """Two layers, the second with a basis of its own and a float branch."""

    def __init__(self, act):
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def noise(*shape):
            return torch.randn(*shape, generator=g)

        turn = Chain(Permute(torch.randperm(64, generator=g)), Rotate(torch.linalg.qr(noise(2, 32, 32))[0]))
        weight = Affine(4, 16)
        self.first = QLinear.of(weight.encode(noise(64, 48) / 7), noise(64), act=act)
        self.second = QLinear.of(
            weight.encode(noise(48, 64) / 8),
            None,
            act=act,
            transform=turn,
            low_rank=(noise(3, 64) / 8, noise(48, 3) / 8),
        )

    def forward(self, x):
        return self.second(nn.functional.silu(self.first(x)))


def plain(layer: QLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer as its class defines it, in float64, on the codes that the float32 input gets."""
    t = x if layer.transform is None else layer.transform(x)
    rounded = t if layer.act is None else layer.act.fake(t)
    y = rounded.double() @ layer.weight.decode().double().T
    if layer.down is not None:
        y = y + t.double() @ layer.down.double().T @ layer.up.double().T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_small_model_runs_on_integers_and_equals_its_definition(act, rows, monkeypatch):
    model = Small(act)
    called = []
    product = kernels.qgemm
    monkeypatch.setattr(kernels, "qgemm", lambda *a, **k: called.append(1) or product(*a, **k))
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(1))
    hidden = model.first(x)
    torch.testing.assert_close(hidden.double(), plain(model.first, x), rtol=1e-5, atol=1e-5)
    hidden = nn.functional.silu(hidden)
    torch.testing.assert_close(model.second(hidden).double(), plain(model.second, hidden), rtol=1e-5, atol=2e-5)
    assert len(called) == 2, "the layers took another path"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_encoded_as_they_are(dtype):
    layer = Small(ACTS["W4A8"]).first
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))


def test_gradients_take_the_float_path_and_agree_with_it():
    layer = Small(ACTS["W4A8"]).second
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    y = layer(x.clone().requires_grad_())
    assert y.requires_grad
    torch.testing.assert_close(y.detach(), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(bool(cpu.absence), reason="the compiled module is absent")
def test_an_input_that_is_not_finite_gives_a_result_that_is_not():
    layer = Small(ACTS["W4A8"]).first
    x = torch.zeros(2, 48)
    x[1, 0] = float("inf")
    y = layer(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("act", [None, *ACTS.values()], ids=["W4A16", *ACTS.keys()])
def test_a_compiled_model_is_one_graph_and_gives_the_same(act):
    torch._dynamo.reset()  # or the cases count as one model compiled too often
    model = Small(act)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(x)  # fills what layers keep from one call to the next
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x[:1]), model(x[:1])), "another shape"


def test_channels_that_groups_do_not_divide_are_refused():
    layer = Small(Affine(8, 36)).first
    with pytest.raises(ValueError, match="48 channels cannot be split in groups of 36"):
        layer(torch.ones(1, 48))
