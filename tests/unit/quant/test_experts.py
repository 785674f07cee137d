"""Experts taken apart: the same function, the stock names, and nothing that was not verified."""

import copy

import pytest
import torch
from torch import nn

from planish._support import CheckpointError, PlanishWarning
from planish.quant import QLinear, quantize, rtn
from planish.quant.experts import Experts, checkpoint_names, fused_experts, unfuse, visiting_all
from planish.quant.sites import find_sites
from planish.quant.stream import Stream

E, F, H = 5, 24, 32


class Fused(nn.Module):
    """Experts as one tensor, in the conventions that models use; a fresh implementation of them."""

    def __init__(self, *, gated=True, transposed=False, interleaved=False, bias=False, twist=False):
        super().__init__()
        self.has_gate, self.is_transposed, self.is_concatenated, self.twist = gated, transposed, not interleaved, twist
        self.act_fn = nn.SiLU()
        g = torch.Generator().manual_seed(0)
        wide = 2 * F if gated else F

        def draw(*shape):
            return nn.Parameter(torch.randn(*shape, generator=g) / 4)

        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, draw(E, H, wide) if transposed else draw(E, wide, H))
        self.down_proj = draw(E, F, H) if transposed else draw(E, H, F)
        if bias:
            setattr(self, name + "_bias", draw(E, wide))
            self.down_proj_bias = draw(E, H)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        up, down = getattr(self, name), self.down_proj
        up, down = (up, down) if self.is_transposed else (up.mT, down.mT)
        for t in range(hidden_states.shape[0]):
            for e, share in zip(top_k_index[t], top_k_weights[t], strict=True):
                h = hidden_states[t] @ up[e]
                if hasattr(self, name + "_bias"):
                    h = h + getattr(self, name + "_bias")[e]
                if self.has_gate:
                    gate, h = h.chunk(2) if self.is_concatenated else (h[0::2], h[1::2])
                    h = self.act_fn(gate) * (h + 1 if self.twist else h)
                else:
                    h = self.act_fn(h)
                y = h @ down[e]
                if hasattr(self, "down_proj_bias"):
                    y = y + self.down_proj_bias[e]
                total[t] += y * share
        return total


class Router(nn.Module):
    def __init__(self, experts=E, linear=False):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        if linear:
            self.pick = nn.Linear(H, experts, bias=False)
        else:
            self.weight = nn.Parameter(torch.randn(experts, H, generator=g))
        self.linear = linear

    def forward(self, x):
        logits = self.pick(x) if self.linear else x @ self.weight.T
        share, index = logits.softmax(-1).topk(2)
        return index, share


class Layer(nn.Module):
    def __init__(self, fused, router):
        super().__init__()
        self.norm, self.gate, self.experts = nn.LayerNorm(H), router, fused

    def forward(self, x):
        y = self.norm(x).reshape(-1, H)
        index, share = self.gate(y)
        return x + self.experts(y, index, share).reshape(x.shape)


def net(fused=Fused, router=Router, depth=2):
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(fused(), router()) for _ in range(depth)])

    def forward(x):
        for layer in model.layers:
            x = layer(x)
        return x

    model.forward = forward
    return model.eval()


def tokens(n=40, seed=1):
    return torch.randn(2, n // 2, H, generator=torch.Generator().manual_seed(seed))


LAYOUTS = [
    {},
    {"bias": True},
    {"transposed": True},
    {"transposed": True, "interleaved": True, "bias": True},
    {"interleaved": True},
    {"gated": False},
    {"gated": False, "transposed": True, "bias": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_layout_is_taken_apart_exactly(layout, dtype):
    model = net(lambda: Fused(**layout)).to(dtype)
    x = tokens().to(dtype)
    before = model(x)
    assert fused_experts(model) == ["layers.0.experts", "layers.1.experts"]
    assert unfuse(model) == ["layers.0.experts", "layers.1.experts"]
    assert not fused_experts(model) and not unfuse(model)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (model(x) - before).norm() <= tolerance * before.norm()
    first = model.layers[0].experts.get_submodule("3")
    assert (first.gate_proj is None) == (not layout.get("gated", True))
    assert (first.down_proj.bias is not None) == layout.get("bias", False)
    assert first.up_proj.weight.shape == (F, H) and first.up_proj.weight.dtype == dtype


def test_the_copy_lets_go_of_the_fused_tensor():
    model = net(depth=1)
    pointer = model.layers[0].experts.gate_up_proj.untyped_storage().data_ptr()
    unfuse(model)
    assert all(p.untyped_storage().data_ptr() != pointer for p in model.parameters())


class OtherArguments(Fused):
    def forward(self, x, index, share):
        return super().forward(x, index, share)


class Extra(Fused):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((H,), 2.0))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) * self.scale


class NoActivation(Fused):
    def __init__(self):
        super().__init__()
        self.act, self.act_fn = self.act_fn, None

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class WrongFlag(Fused):
    """Says concatenated and computes interleaved."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.is_concatenated = False
        try:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        finally:
            self.is_concatenated = True


@pytest.mark.parametrize("make", [lambda: Fused(twist=True), OtherArguments, Extra, NoActivation, WrongFlag])
def test_what_cannot_be_verified_stays_as_it_is_and_is_reported(make):
    model, x = net(make), tokens()
    state, before = copy.deepcopy(model.state_dict()), model(x)
    assert unfuse(model) == []
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(x), before)
    model.layers[0].dense = nn.Linear(H, H)  # something to quantize, or there would be nothing to do
    model.layers[1].dense = nn.Linear(H, H)
    report = quantize(model, [x], rtn(group_size=8))
    assert {"layers.0.experts", "layers.1.experts"} <= set(report.left_in_float)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_model_without_weights_is_verified_by_a_stand_in(layout):
    model = net(lambda: Fused(**layout)).to("meta")
    assert unfuse(model) == ["layers.0.experts", "layers.1.experts"]
    assert all(p.is_meta for p in model.parameters())
    twisted = net(lambda: Fused(**{**layout, "gated": True}, twist=True)).to("meta")
    assert unfuse(twisted) == []


def test_visiting_all_reaches_every_expert_and_changes_nothing():
    model, x = net(depth=1), tokens(2)
    unfuse(model)
    experts, seen = model.layers[0].experts, []
    for name, expert in experts.named_children():
        expert.register_forward_hook(lambda m, a, out, n=name: seen.append(n))
    before = model(x)
    assert len(seen) < E
    seen.clear()
    with visiting_all(model):
        assert torch.equal(model(x), before)
    assert sorted(seen) == sorted(str(e) for e in range(E))
    seen.clear()
    model(x)
    assert len(seen) < E


@pytest.mark.parametrize("linear", [False, True])
def test_one_smoothing_site_for_all_experts_with_the_router_as_a_reader(linear):
    model, x = net(router=lambda: Router(linear=linear), depth=1), tokens(6)
    unfuse(model)
    stream = Stream(model, [x])
    block = stream.block(0, stream.start())
    first, *rest = find_sites(block, lambda name: False)
    router = "gate.pick" if linear else "gate"
    assert set(first.consumers) == {f"experts.{e}.{p}" for e in range(E) for p in ("gate_proj", "up_proj")}
    assert list(first.readers) == [router] and first.producer_name == "norm"
    assert first.split and first.whole == router
    assert [(s.kind, s.producer_name) for s in rest] == [
        (f"experts.{e}.down_proj", f"experts.{e}.up_proj") for e in range(E)
    ]


def many(linear=True):
    """Twenty experts: a plain router with more than sixteen outputs is known by their number."""

    class Many(Fused):
        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.gate_up_proj = nn.Parameter(torch.randn(20, 2 * F, H, generator=g) / 4)
            self.down_proj = nn.Parameter(torch.randn(20, H, F, generator=g) / 4)

    return net(Many, lambda: Router(20, linear=linear), depth=1)


def test_a_plain_router_is_known_by_its_number_of_outputs():
    model, x = many(), tokens(200)
    report = quantize(model, [x], rtn(group_size=8))
    assert report.left_in_float == ["layers.0.gate.pick"]
    assert type(model.layers[0].experts.get_submodule("7.up_proj")) is QLinear


def test_plain_lists_of_experts_are_grouped_too():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.pick = nn.Linear(H, 16, bias=False)
            one = [nn.Sequential(nn.Linear(H, F), nn.ReLU(), nn.Linear(F, H)) for _ in range(16)]
            self.experts = nn.ModuleList(one)

        def forward(self, x):
            y = x.reshape(-1, H)
            choice = self.pick(y).argmax(-1)
            out = torch.zeros_like(y)
            for e, expert in enumerate(self.experts):
                rows = torch.where(choice == e)[0]
                out[rows] = expert(y[rows])
            return out.reshape(x.shape)

    model, x = Plain().eval(), tokens(600)
    report = quantize(model, [x], rtn(group_size=8))
    assert report.left_in_float == ["pick"]
    assert len(report.blocks) == 1  # experts are not a chain of blocks
    assert sum(report.blocks[0].tokens.values()) == 600
    assert report.blocks[0].sites == 17


def test_tokens_are_counted_and_experts_without_any_are_rounded_to_nearest():
    model, x = net(depth=1), tokens(2)
    twin = copy.deepcopy(model)
    unfuse(twin)
    index, _ = twin.layers[0].gate(twin.layers[0].norm(x).reshape(-1, H))
    hit = {str(int(i)) for i in index.unique()}

    from dataclasses import replace

    def refuse(site, method):
        assert site.moments.rows  # a method that needs statistics gets only sites that have some
        return rtn().round(site, method)

    with pytest.warns(PlanishWarning, match=r"block layers.0: no token was sent to experts\."):
        report = quantize(model, [x], replace(rtn(group_size=8), round=refuse))
    counted = report.blocks[0].tokens
    assert set(counted) == {f"experts.{e}" for e in range(E)}
    assert {n.split(".")[1] for n, c in counted.items() if c} == hit and len(hit) < E
    assert sum(counted.values()) == 2 * 2  # two tokens, two experts each
    assert set(report.blocks[0].unseen) == {f"experts.{e}" for e in range(E)} - {f"experts.{e}" for e in hit}
    for e in range(E):
        for part in ("gate_proj", "up_proj", "down_proj"):
            dense = twin.layers[0].experts.get_submodule(f"{e}.{part}")
            ours = model.layers[0].experts.get_submodule(f"{e}.{part}")
            assert torch.equal(ours.weight.codes, rtn(group_size=8).weight.encode(dense.weight.detach()).codes)
    assert report.to_json()["blocks"][0]["tokens"] == counted


def test_shared_statistics_count_every_real_token_once():
    from planish.quant.moments import measure

    model, x = net(depth=1), tokens(12)
    unfuse(model)
    stream = Stream(model, [x, tokens(8, seed=5)])
    block = stream.block(0, stream.start())
    sites = find_sites(block, lambda name: False)
    measure(block, sites)
    y = torch.cat([model.layers[0].norm(b).reshape(-1, H) for b in stream.batches])
    assert sites[0].moments.rows == 20
    assert torch.allclose(sites[0].moments.second_moment, y.square().mean(0), rtol=1e-5)
    assert torch.allclose(sites[0].moments.amax, y.abs().amax(0))


# ---- stock names


@pytest.fixture
def hf():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral(hf):
    return hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON, num_local_experts=4))


def qwen(hf):
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**COMMON, head_dim=8, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2)
    )


@pytest.mark.parametrize(
    ("make", "path", "parts"),
    [
        (mixtral, "model.layers.{l}.block_sparse_moe.experts.{e}.{p}", ("w1", "w3", "w2")),
        (qwen, "model.layers.{l}.mlp.experts.{e}.{p}", ("gate_proj", "up_proj", "down_proj")),
    ],
    ids=["Mixtral", "Qwen3-MoE"],
)
def test_names_are_those_that_stock_checkpoints_use(hf, tmp_path, make, path, parts):
    model = make(hf).eval()
    model.save_pretrained(tmp_path)  # what the model's own code writes
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    unfuse(model)
    names = checkpoint_names(model)
    ours = ("gate_proj", "up_proj", "down_proj")
    assert names == {
        f"model.layers.{n}.mlp.experts.{e}.{o}": path.format(l=n, e=e, p=p)
        for n in range(2) for e in range(4) for o, p in zip(ours, parts, strict=True)
    }  # fmt: skip
    for name, key in names.items():
        assert torch.equal(model.get_submodule(name).weight, stored[key + ".weight"]), name


def test_names_hold_after_rounding_and_plain_models_keep_theirs(hf):
    model = qwen(hf).eval()
    ids = torch.randint(3, 64, (4, 30), generator=torch.Generator().manual_seed(0))
    quantize(model, [{"input_ids": ids}], rtn(group_size=8))
    names = checkpoint_names(model)
    assert len(names) == 2 * 4 * 3 and all(isinstance(model.get_submodule(n), QLinear) for n in names)
    plain = net(depth=1)
    unfuse(plain)
    assert all(k == v for k, v in checkpoint_names(plain).items()) and len(checkpoint_names(plain)) == 3 * E


def test_a_model_that_cannot_name_its_experts_is_refused(hf):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON))
    fused = net(depth=1)
    unfuse(fused)
    model.model.layers[0].experts = fused.layers[0].experts
    assert isinstance(model.model.layers[0].experts, Experts)
    with pytest.raises(CheckpointError, match=r"`model.layers.0.experts.0.gate_proj` has no name of its own"):
        checkpoint_names(model)


def test_the_model_s_choice_of_kernel_is_left_as_it_was(hf):
    model = mixtral(hf)
    model.config._experts_implementation = "grouped_mm"
    unfuse(model)
    assert model.config._experts_implementation == "grouped_mm"
