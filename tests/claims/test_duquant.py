"""DuQuant: exact before rounding, its claim beside plain rounding, smoothing and Hadamard, its files."""

import copy
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from planish import kernels
from planish.quant import METHODS, Affine, QLinear, duquant, inspect, load, quantize, rtn, save
from planish.quant.engine import Method, Walk, process
from planish.quant.methods.duquant import DuRotate, Hadamard
from planish.quant.methods.gptq import Compensate
from planish.quant.methods.learned_clip import LearnClip
from planish.quant.methods.smoothquant_plus import Smooth
from planish.quant.moments import measure
from planish.quant.transforms import Chain, Permute, Rotate

transformers = pytest.importorskip("transformers")
plant_outliers = runpy.run_path(str(Path(__file__).parents[1] / "planted.py"))["plant_outliers"]
W4, A4 = Affine(4, None), Affine(4, None, scale_dtype="float32")
PLAIN = replace(rtn(), weight=W4, act=A4, online=True)


def llama(heads: int = 2, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=heads, vocab_size=97, initializer_range=0.1, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model


def tokens(batches: int = 2, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (2, 40), generator=generator) for _ in range(batches)]


def planted(factor: float, layers: int = 2) -> nn.Module:
    model = llama(layers=layers)
    assert plant_outliers(model, tokens(1), factor=factor, share=0.03)
    return model


def error(model: nn.Module, method: Method, batches: list | None = None) -> float:
    """Relative squared error of the logits on tokens that calibration never saw."""
    unseen = tokens(1, seed=9)[0]
    wanted = model(unseen).logits
    small = copy.deepcopy(model)
    quantize(small, batches or tokens(), method)
    return float((small(unseen).logits - wanted).square().mean() / wanted.square().mean())


@pytest.mark.parametrize("order", ["rotate", "permute"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("heads", [2, 4])
def test_nothing_changes_before_rounding(order, shared, heads):
    """Smoothing, rotations and permutations in float64, folded and online: the block computes the same."""
    model = llama(heads, layers=1, dtype=torch.float64)
    plant_outliers(model, tokens(1), factor=100.0)
    walk = Walk(model, tokens())
    block = walk.stream.block(0, walk.stream.start())
    sites = walk.sites(block)
    before = measure(block, sites)
    step = DuRotate(block_size=16, order=order, shared=shared, steps=40)
    nothing = replace(PLAIN, transform=step, round=lambda site, method: {})
    folded = process(block, sites, nothing)
    assert len(folded) == 4
    for now, then in zip(block.run(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-10)
    down = next(s for s in sites if "mlp.down_proj" in s.consumers)
    online = down.online.parts if isinstance(down.online, Chain) else [down.online]
    kinds = [type(part) for part in online]
    if order == "permute":  # gate and up took the scale and the permutation: one rotation is left
        assert kinds == [Rotate]
    else:
        assert kinds == [Rotate, Permute, Rotate]
    assert all(part.blocks.shape[0] == (1 if shared else 8) for part in online if isinstance(part, Rotate))


def test_layers_that_read_one_input_share_one_transform():
    model = llama(layers=1)
    quantize(model, tokens(), duquant(block_size=16))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.transform is attention.k_proj.transform is attention.v_proj.transform
    assert isinstance(attention.q_proj.transform, Chain)


def test_sixteen_bits_or_nearly_reproduce_the_float_model():
    model = planted(100.0)
    assert error(model, duquant(bits=8, act_bits=8, block_size=16, act_clip=1.0, weight_clip=1.0)) < 1e-2
    assert error(model, replace(duquant(block_size=16, weight_clip=1.0, bits=8, group_size=16), act=None)) < 1e-3


@pytest.mark.claim("duquant", "outliers planted with factor 10 to 1000: W4A4 holds where plain rounding collapses")
@pytest.mark.parametrize("factor", [10.0, 100.0, 1000.0])
def test_holds_where_rounding_collapses(factor, record_claim):
    model = planted(factor)
    ours, plain = error(model, duquant(block_size=16)), error(model, PLAIN)
    record_claim(plain / ours, 2.0, "times less error than plain rounding")
    assert plain > 2.0 * ours


def like_a_model_s(seed: int) -> torch.Tensor:
    """Inputs with a few channels large for all tokens, as neighbours, and two channels huge for single tokens."""
    x = torch.randn(192, 256, generator=torch.Generator().manual_seed(seed))
    x[:, 40:52] *= 10
    x[:4, 100] = 200.0
    x[4:6, 200] = -200.0
    return x


@pytest.mark.claim("duquant", "W4A4: plain rounding > smoothing > Hadamard > DuQuant in error, each by a margin")
def test_the_order_of_the_paper(record_claim):
    def lost(method: Method) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 128)).requires_grad_(False)
        net[0].weight[:, 40:52] /= 1.5  # trained weights are smaller where activations are large
        wanted = net(like_a_model_s(7))
        quantize(net, [like_a_model_s(1), like_a_model_s(2)], method)
        gap = net(like_a_model_s(7)) - wanted
        return float((gap.square().sum(-1) / wanted.square().sum(-1)).mean())

    plain, smooth = lost(PLAIN), lost(replace(PLAIN, transform=Smooth(0.6)))
    fixed, ours = lost(replace(PLAIN, transform=Hadamard(64))), lost(duquant(block_size=64))
    record_claim(fixed / ours, 1.5, "times less error than Hadamard")
    record_claim(smooth / ours, 1.5, "times less error than smoothing")
    assert plain > 1.1 * smooth > 1.1 * 1.1 * fixed > 1.1 * 1.1 * 1.5 * ours, (plain, smooth, fixed, ours)


def test_the_pivot_of_the_authors_code_and_a_random_rotation_run_too():
    model = planted(100.0, layers=1)
    plain = error(model, PLAIN)
    for step in (
        DuRotate(block_size=16, pivot="row", shared=True),
        Hadamard(16, Smooth(0.6), random=True),
        Hadamard(None, Smooth(0.6)),
    ):
        assert error(model, replace(PLAIN, transform=step)) < plain


def test_two_runs_give_the_same_bytes_and_another_seed_others():
    states = []
    for seed in (0, 0, 1):
        model = llama(layers=1)
        quantize(model, tokens(), duquant(block_size=16, seed=seed))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_saved_and_loaded_it_runs_on_integers(tmp_path, symmetric, monkeypatch):
    plugin = pytest.importorskip("planish.plugins.transformers")
    model = llama(layers=1)
    report = quantize(model, tokens(), duquant(block_size=16, symmetric=symmetric))
    assert save(model, tmp_path / "a", layout="planish", report=report) == "planish"
    called = []
    product = kernels.qgemm
    monkeypatch.setattr(kernels, "qgemm", lambda *a, **k: called.append(k["x_zero"]) or product(*a, **k))
    wanted = model(tokens()[0]).logits
    assert len(called) == 7 and all((zero is None) == symmetric for zero in called)
    ours, theirs = load(tmp_path / "a"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for twin in (ours, theirs):
        twin.requires_grad_(False)  # integers have no gradients
        assert torch.equal(twin(tokens()[0]).logits, wanted)
    found = inspect(tmp_path / "a")
    assert found["transforms"] == 7 and "clip=0.9" in next(iter(found["formats"]))
    prompt = tokens()[0][:1, :6]
    out = theirs.generate(prompt, past_key_values=plugin.QuantizedCache(), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 10)


def test_learned_clipping_lowers_the_error_of_the_block_and_never_raises_it():
    model = planted(30.0, layers=1)
    plain = duquant(block_size=16, weight_clip=1.0, alpha=0.5)
    losses = []
    for method in (plain, replace(plain, refine=LearnClip(epochs=10))):
        small = copy.deepcopy(model)
        losses.append(quantize(small, tokens(), method).blocks[0].error)
        assert all(isinstance(small.model.layers[0].mlp.get_submodule(n), QLinear) for n in ("up_proj", "down_proj"))
    assert losses[1] < 0.98 * losses[0]


@pytest.mark.slow
def test_compensated_rounding_goes_with_rotations():
    model = planted(100.0, layers=1)
    plain = duquant(block_size=16, weight_clip=1.0)
    fewer = replace(plain, act=None), replace(plain, act=None, round=Compensate())
    data = tokens(8)
    assert error(model, fewer[1], data) < error(model, fewer[0], data)


def test_the_preset_is_the_paper_s():
    method = METHODS["duquant"]()
    assert method.weight == Affine(4, None, clip=0.8)
    assert method.act == Affine(4, None, scale_dtype="float32", clip=0.9)
    step = method.transform
    assert (step.block_size, step.steps, step.permutations, step.smooth) == (128, 256, 1, Smooth(0.6))
    learned = duquant(lwc=True)
    assert learned.weight.clip == 1 and learned.transform.smooth == Smooth(0.5) and learned.refine == LearnClip()
    assert repr(METHODS["duquant"]()) == repr(METHODS["duquant"]()) and "DuRotate" in repr(method)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: DuRotate(block_size=1), "DuRotate: `block_size` must be an integer of at least 2; got 1"),
        (lambda: DuRotate(pivot="middle"), "DuRotate: `pivot` must be one of column, row; got 'middle'"),
        (lambda: DuRotate(order="zigzag"), "DuRotate: `order` must be one of rotate, permute; got 'zigzag'"),
        (lambda: DuRotate(steps=-1), "DuRotate: `steps` must be at least 0; got -1"),
        (lambda: DuRotate(permutations=-1), "DuRotate: `permutations`"),
        (lambda: DuRotate(tokens=0), "DuRotate: `tokens` must be at least 1; got 0"),
        (lambda: DuRotate(rows=0), "DuRotate: `rows`"),
        (lambda: Hadamard(0), "Hadamard: `block_size` must be an integer of at least 2; got 0"),
        (lambda: LearnClip(epochs=0), "LearnClip: `epochs` must be at least 1; got 0"),
        (lambda: LearnClip(lr=0.0), "LearnClip: `lr` must be above 0; got 0.0"),
        (lambda: duquant(alpha=2.0), "Smooth: `alpha`"),
        (lambda: duquant(act_bits=9), "Affine: `bits`"),
        (lambda: duquant(act_clip=0.0), "Affine: `clip`"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
