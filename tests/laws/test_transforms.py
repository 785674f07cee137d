"""The laws of every transform: nothing changes until something is rounded."""

import copy

import pytest
import torch
from torch import nn

from planish.quant import fold
from planish.quant.sites import Site, find_sites
from planish.quant.stream import Block
from planish.quant.transforms import Chain, Permute, Rotate, Scale, Shift

C = 24


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(noise(count, size, size, seed=seed)).Q


def scale(seed=1):
    return Scale(noise(C, seed=seed).mul(2).exp())


def shift(seed=2):
    return Shift(noise(C, seed=seed))


def permute(seed=3):
    return Permute(torch.randperm(C, generator=torch.Generator().manual_seed(seed)))


def rotate(seed=4, count=3):
    return Rotate(orthogonal(count, C // count, seed))


def shared(seed=5):
    return Rotate(orthogonal(1, 6, seed))


TRANSFORMS = {
    "Scale": scale,
    "Shift": shift,
    "Permute": permute,
    "Rotate": rotate,
    "Rotate, one block for all": shared,
    "Rotate, one block": lambda: rotate(count=1),
    "Chain of DuQuant": lambda: Chain(scale(), rotate(), permute(), shared()),
    "Chain with a shift inside": lambda: Chain(scale(), shift(), rotate(), shift(9), permute()),
    "Chain of a chain": lambda: Chain(Chain(permute(), scale()), Chain(shift(), scale(8))),
    "Chain of nothing": Chain,
}
EACH = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
LINEAR = pytest.mark.parametrize("make", [m for m in TRANSFORMS.values() if m().linear])
DIAGONAL = {"Scale": scale, "Chain of scales": lambda: Chain(scale(), scale(7))}


@EACH
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_the_same(make, bias):
    t, w, x = make(), noise(5, C, seed=10), noise(2, 3, C, seed=11)
    b = noise(5, seed=12) if bias else None
    ours = nn.functional.linear(t(x), t.weight(w), t.bias(w, b))
    assert torch.allclose(ours, nn.functional.linear(x, w, b), rtol=1e-10, atol=1e-10)


@EACH
def test_a_transform_does_not_write_to_what_it_is_given(make):
    t, w, x, b = make(), noise(5, C), noise(3, C), noise(5)
    before = w.clone(), x.clone(), b.clone()
    t(x), t.weight(w), t.bias(w, b)
    assert all(torch.equal(now, then) for now, then in zip((w, x, b), before, strict=True))


@EACH
def test_linear_says_whether_zero_stays_zero(make):
    t = make()
    assert bool((t(torch.zeros(1, C, dtype=torch.float64)) == 0).all()) == t.linear


@EACH
def test_diagonal_says_whether_channels_stay_apart(make):
    t = make()
    zero = torch.zeros(1, C, dtype=torch.float64)
    matrix = t(torch.eye(C, dtype=torch.float64)) - t(zero)
    if t.diagonal:
        assert torch.equal(matrix, matrix.diagonal().diag()) and t.linear
    elif len(getattr(t, "parts", [1])):
        assert not torch.equal(matrix, matrix.diagonal().diag()) or not t.linear


@pytest.mark.parametrize("make", [permute, rotate, shared, lambda: Chain(rotate(), permute(), shared())])
def test_orthogonal_ones_preserve_norms(make):
    x = noise(7, C)
    assert torch.allclose(make()(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12)


@EACH
def test_state_survives_a_round_trip(make):
    t = make()
    other = copy.deepcopy(t)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(t.state_dict())
    x = noise(3, C)
    assert torch.equal(other(x), t(x))


class Pair(nn.Module):
    """producer -> (what lies between) -> consumer."""

    def __init__(self, producer, between=None, width=C):
        super().__init__()
        self.producer, self.between = producer, between or nn.Identity()
        self.consumer = nn.Linear(width, 4)

    def forward(self, x):
        return self.consumer(self.between(self.producer(x)))


def dense(inputs=9, outputs=C, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(noise(*p.shape, seed=20 + i))
    return layer


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + w, as Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(C, seed=30))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def layer_norm():
    norm = nn.LayerNorm(C)
    with torch.no_grad():
        norm.weight.copy_(noise(C, seed=31))
        norm.bias.copy_(noise(C, seed=32))
    return norm


def rms_norm():
    norm = nn.RMSNorm(C)
    with torch.no_grad():
        norm.weight.copy_(noise(C, seed=33))
    return norm


def site_in(pair: Pair, channels=None, width=9):
    block = Block("", pair.double().eval(), [noise(6, width, seed=40)], [{}], [None])
    return block, Site("consumer", {"consumer": pair.consumer}, {}, pair.producer, "producer", channels, block)


@LINEAR
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_absorbs_every_linear_transform(make, bias):
    t, pair = make(), Pair(dense(bias=bias))
    block, site = site_in(pair)
    z = block.inputs[0]
    old, whole = t(pair.producer(z)), pair(z)
    assert fold.apply(block, t, site)
    assert torch.allclose(pair.producer(z), old, rtol=1e-10, atol=1e-10)
    assert torch.allclose(pair(z), whole, rtol=1e-10, atol=1e-10)
    assert site.online is None


@pytest.mark.parametrize("make", DIAGONAL.values(), ids=DIAGONAL.keys())
@pytest.mark.parametrize("norm", [layer_norm, rms_norm, OnePlus])
def test_a_norm_absorbs_every_diagonal_transform(make, norm):
    t, pair = make(), Pair(norm())
    block, site = site_in(pair, width=C)
    z = block.inputs[0]
    old, whole = t(pair.producer(z)), pair(z)
    assert fold.apply(block, t, site)
    assert torch.allclose(pair.producer(z), old, rtol=1e-10, atol=1e-10)
    assert torch.allclose(pair(z), whole, rtol=1e-10, atol=1e-10)


class Repeat(nn.Module):
    """Heads that share a key-value head: channel j comes from channel index[j]."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[..., self.index]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", DIAGONAL.values(), ids=DIAGONAL.keys())
def test_a_many_to_one_map_is_absorbed_once_the_scale_is_tied(make, bias):
    index = torch.arange(8).repeat_interleave(3)[torch.randperm(C, generator=torch.Generator().manual_seed(1))]
    pair = Pair(dense(outputs=8, bias=bias), Repeat(index))
    block, site = site_in(pair, channels=index)
    factor = make()(torch.ones(1, C, dtype=torch.float64))[0]
    t = Scale(site.tied(1 / factor))
    z = block.inputs[0]
    old, whole = t(pair.between(pair.producer(z))), pair(z)
    assert fold.apply(block, t, site)
    assert torch.allclose(pair.between(pair.producer(z)), old, rtol=1e-10, atol=1e-10)
    assert torch.allclose(pair(z), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [scale, permute, rotate])
def test_a_slice_of_a_fused_layer_is_absorbed_and_the_rest_stays(make):
    index = torch.arange(C) + 10
    pair = Pair(dense(outputs=C + 20), Repeat(index))
    block, site = site_in(pair, channels=index)
    z = block.inputs[0]
    rest = torch.ones(C + 20, dtype=torch.bool)
    rest[index] = False
    kept, whole, old = pair.producer(z)[:, rest], pair(z), pair.producer(z)[:, index]
    t = make()
    assert fold.apply(block, t, site)
    assert torch.equal(pair.producer(z)[:, rest], kept)
    assert torch.allclose(pair.producer(z)[:, index], t(old), rtol=1e-10, atol=1e-10)
    assert torch.allclose(pair(z), whole, rtol=1e-10, atol=1e-10)


REFUSED = {
    "a shift is not linear": (shift, lambda: Pair(dense())),
    "GELU lies between": (scale, lambda: Pair(dense(), nn.GELU())),
    "a rotation does not pass a ReLU": (rotate, lambda: Pair(dense(), nn.ReLU())),
    "a norm is diagonal": (rotate, lambda: Pair(layer_norm())),
    "a norm keeps its channels in order": (permute, lambda: Pair(rms_norm())),
    "a norm without weight": (scale, lambda: Pair(OtherNorm())),
}


class OtherNorm(nn.Module):
    """A weight that is not what the output is proportional to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(C, seed=50))

    def forward(self, x):
        return torch.tanh(x * self.weight)


@pytest.mark.parametrize(("make", "build"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_fold_leaves_the_producer_bit_identical(make, build):
    pair = build()
    width = next(pair.producer.parameters()).shape[-1]
    block, site = site_in(pair, width=width)
    before = {n: p.clone() for n, p in pair.producer.named_parameters()}
    whole = pair(block.inputs[0])
    t = make()
    assert not fold.apply(block, t, site, online=True)
    assert all(torch.equal(p, before[n]) for n, p in pair.producer.named_parameters())
    assert site.online is t
    assert torch.allclose(pair(block.inputs[0]), whole, rtol=1e-10, atol=1e-10)  # it goes on online, exactly


@pytest.mark.parametrize(("make", "build"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_fold_that_may_not_stay_online_changes_nothing(make, build):
    pair = build()
    width = next(pair.producer.parameters()).shape[-1]
    block, site = site_in(pair, width=width)
    before = {n: p.clone() for n, p in pair.named_parameters()}
    assert not fold.apply(block, make(), site)
    assert all(torch.equal(p, before[n]) for n, p in pair.named_parameters())
    assert site.online is None


def test_an_untied_scale_under_a_many_to_one_map_is_refused():
    index = torch.arange(C) // 3
    pair = Pair(dense(outputs=8), Repeat(index))
    block, site = site_in(pair, channels=index)
    before, whole = pair.producer.weight.clone(), pair(block.inputs[0])
    assert not fold.apply(block, scale(), site)
    assert torch.equal(pair.producer.weight, before)
    assert torch.allclose(pair(block.inputs[0]), whole, rtol=1e-10, atol=1e-10)


def test_of_a_chain_what_can_be_folded_is_and_the_rest_stays_online():
    pair = Pair(rms_norm())
    block, site = site_in(pair, width=C)
    whole, first = pair(block.inputs[0]), scale()
    wanted = first(pair.producer(block.inputs[0]))
    rest = (rotate(), permute())
    assert not fold.apply(block, Chain(first, Chain(*rest)), site, online=True)
    assert torch.allclose(pair.producer(block.inputs[0]), wanted, rtol=1e-10, atol=1e-10)
    assert list(site.online.parts) == list(rest)
    assert torch.allclose(pair(block.inputs[0]), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_rotation_shared_by_heads_is_absorbed_where_they_share_a_producer(bias):
    index = torch.arange(8).view(2, 1, 4).expand(2, 3, 4).reshape(C)  # two key-value heads of 4, three readers each
    pair = Pair(dense(outputs=8, bias=bias), Repeat(index))
    block, site = site_in(pair, channels=index)
    t = Rotate(orthogonal(1, 4, 5))
    old, whole = t(pair.between(pair.producer(block.inputs[0]))), pair(block.inputs[0])
    assert fold.apply(block, t, site)
    assert torch.allclose(pair.between(pair.producer(block.inputs[0])), old, rtol=1e-10, atol=1e-10)
    assert torch.allclose(pair(block.inputs[0]), whole, rtol=1e-10, atol=1e-10)
    before = pair.producer.weight.clone()
    assert not fold.apply(block, Rotate(orthogonal(6, 4, 6)), site), "heads that turn differently share no output"
    assert torch.equal(pair.producer.weight, before)


class Gated(nn.Module):
    """silu(gate) * up -> down, in two layers or as halves of one."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = dense(outputs=2 * C)
        else:
            self.gate, self.up = dense(), nn.Linear(9, C).double()
        self.down = nn.Linear(C, 16)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("fused", [True, False])
def test_a_permutation_passes_a_gate_when_the_gate_follows(fused):
    net = Gated(fused).double().eval()
    block = Block("", net, [noise(6, 9, seed=40)], [{}], [None])
    site = next(s for s in find_sites(block, lambda name: False) if "down" in s.consumers)
    assert set(site.partners) == (set() if fused else {"gate"})
    before, whole = copy.deepcopy(net), net(block.inputs[0])
    t = permute()
    assert fold.apply(block, t, site) and site.online is None
    assert torch.equal(net.down.weight, t.weight(before.down.weight))
    assert torch.allclose(net(block.inputs[0]), whole, rtol=1e-10, atol=1e-10)
    kept = {n: p.clone() for n, p in net.named_parameters()}
    assert not fold.apply(block, rotate(), site), "a rotation does not pass a product"
    assert all(torch.equal(p, kept[n]) for n, p in net.named_parameters())


def test_a_norm_that_something_else_reads_is_refused():
    class Residual(Pair):
        def forward(self, x):
            y = self.producer(x)
            return self.consumer(y) + y[..., :4]

    pair = Residual(layer_norm())
    block, site = site_in(pair, width=C)
    before, whole = copy.deepcopy(pair.producer.state_dict()), pair(block.inputs[0])
    assert not fold.apply(block, scale(), site)
    assert all(torch.equal(p, before[n]) for n, p in pair.producer.state_dict().items())
    assert torch.allclose(pair(block.inputs[0]), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Scale(torch.tensor([1.0, 0.0])), r"Scale: `scale` must be finite and above zero .* got 0.0"),
        (lambda: Scale(torch.tensor([1.0, -2.0])), "got -2.0"),
        (lambda: Scale(torch.tensor([float("nan")])), "got nan"),
        (lambda: Scale(torch.tensor([float("inf")])), "got inf"),
        (lambda: Shift(torch.tensor([0.0, float("inf")])), r"Shift: `offset` must be finite in every channel; got inf"),
        (lambda: Permute(torch.tensor([0, 0, 1])), r"Permute: `index` must be a permutation of 0 to 2; got"),
        (lambda: Permute(torch.tensor([1, 2, 3])), "Permute: `index`"),
        (lambda: Rotate(torch.ones(1, 2, 2)), r"Rotate: `blocks` must be orthogonal matrices; got"),
        (lambda: Rotate(torch.full((1, 2, 2), float("nan"))), "Rotate: `blocks`"),
        (lambda: rotate()(noise(2, C + 8)), "Rotate: `x` must be channels that"),
        (lambda: shared()(noise(2, C + 1)), "Rotate: `x` must be channels that"),
    ],
)  # fmt: skip
def test_bad_arguments(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
