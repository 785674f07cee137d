"""Training and measuring smooth adapters: resuming, accumulation, ranks; and the sentence of each refused argument."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from planish._support import CheckpointError
from planish.diffusion import (
    StepwiseVariationRegularizer,
    add_lora,
    ddim_sample,
    istd,
    load_smooth_lora,
    predict_x0,
    save_smooth_lora,
    smooth_lora_config,
    train_smooth_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch, at its first jvp


class Schedule:
    def __init__(self, count=20, **config):
        self.config = {"num_train_timesteps": count, "prediction_type": "epsilon", **config}
        self.alphas_cumprod = torch.linspace(0.98, 0.05, count)
        self.timesteps = torch.arange(count).flip(0)

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps).flip(0) * (len(self.alphas_cumprod) // steps)


class Net(nn.Module):
    """A small denoiser of vectors with attention over their four parts, and dropout that must stay off."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.to_q, self.to_k, self.to_v = (nn.Linear(2, 8) for _ in range(3))
            self.time, self.out = nn.Linear(1, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, z, t, label=None):
        x = z.reshape(len(z), 4, 2)
        mixed = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        h = self.drop(mixed + self.time(t[:, None, None] / 20))
        return self.out(h.sin()).reshape(z.shape) + (0 if label is None else label[:, None])


def batches(n=3):
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 8, generator=draw), {"label": torch.zeros(8)}) for _ in range(n)]


def config(rank=2):
    return smooth_lora_config(rank, ["to_q", "to_v", "out"])


def train(net, output=None, steps=6, **settings):
    settings = {"config": config(), "lr": 1e-2, **settings}
    return train_smooth_lora(net, batches(), Schedule(), output, steps=steps, **settings)


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters() if "lora_" in name}


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vjp", "jvp", "difference"])
def test_training_moves_the_adapter_and_nothing_else(method):
    net = Net().train()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    told = []
    run = train(net, method=method, progress=lambda *args: told.append(args))
    assert net.training and net.drop.training
    for name, p in net.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace("base_layer.", "")]) and not p.requires_grad
    assert all(float(p.abs().max()) > 0 for name, p in weights(net).items() if "lora_B" in name)
    assert len(run.losses) == len(run.variations) == 6 and run.file is None
    assert [t[0] for t in told] == [1, 2, 3, 4, 5, 6] and "variation" in str(run)


@pytest.mark.parametrize("method", ["vjp", "jvp", "difference"])
def test_a_part_of_a_batch_may_be_regularized(method):
    class Counted(Net):
        def forward(self, z, t, label=None):
            sizes.append(len(z))
            assert len(label) == len(z) == len(t)
            return super().forward(z, t, label)

    sizes: list[int] = []
    whole = train(Net(), method=method, steps=1)
    part = train(Counted(), method=method, steps=1, share=0.3)  # 3 of 8
    assert sizes == [3, 5] if method == "vjp" else set(sizes) == {3, 5}
    assert part.losses[0] == pytest.approx(whole.losses[0], rel=1e-6)  # the error is of all rows
    if method == "vjp":
        full = train(Net(), method=method, steps=1, share=1.0)
        assert full.losses == whole.losses and full.variations == whole.variations != part.variations


def test_an_adapter_that_did_not_train_changes_nothing_and_merges():
    net, z, t = Net().eval(), torch.randn(5, 8), torch.arange(5)
    plain = net(z, t)
    pairs = torch.randn(2, 4, 8)
    before = istd(lambda e: ddim_sample(net, e, Schedule(), steps=5), pairs)
    add_lora(net, config())
    assert torch.equal(net(z, t), plain)
    assert istd(lambda e: ddim_sample(net, e, Schedule(), steps=5), pairs).istd == before.istd
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    changed = net(z, t)
    assert not torch.allclose(changed, plain, atol=1e-3)
    for layer in (net.to_q, net.to_v, net.out):
        layer.merge()
    assert torch.allclose(net(z, t), changed, atol=1e-5)


def test_a_stopped_training_ends_with_the_same_bits(tmp_path):
    whole = Net()
    train(whole, tmp_path / "a", steps=7, regularizer=StepwiseVariationRegularizer(scope="per_timestep"), save_every=2)

    class StoppedError(Exception):
        pass

    def stop(done, *_):
        if done == 5:
            raise StoppedError

    settings = {"steps": 7, "save_every": 2}
    with pytest.raises(StoppedError):
        reg = StepwiseVariationRegularizer(scope="per_timestep")
        train(Net(), tmp_path / "b", progress=stop, regularizer=reg, **settings)
    assert not list((tmp_path / "b").rglob("*.partial"))
    again = Net()
    run = train(again, tmp_path / "b", regularizer=StepwiseVariationRegularizer(scope="per_timestep"), **settings)
    assert run.steps == 7 and len(run.losses) == 3  # two of these were done before, and lost
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))
    files = [(tmp_path / x / "pytorch_lora_weights.safetensors").read_bytes() for x in "ab"]
    assert files[0] == files[1]


def test_state_of_another_training_is_refused(tmp_path):
    train(Net(), tmp_path, steps=2)
    with pytest.raises(CheckpointError, match="a training of other settings"):
        train(Net(), tmp_path, steps=3, lr=1e-3)
    with pytest.raises(CheckpointError, match="a training of other settings"):
        train(Net(seed=1), tmp_path, steps=3)
    with pytest.raises(CheckpointError, match="the training of another adapter"):
        train(Net(), tmp_path, steps=3, config=config(3))
    with pytest.raises(ValueError, match="`steps` must be at least 2, the steps already done; got 1"):
        train(Net(), tmp_path, steps=1)
    assert train(Net(), tmp_path, steps=1, lr=1e-3, resume=False).steps == 1
    (tmp_path / "training" / "state.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        train(Net(), tmp_path, steps=3)


def test_weight_zero_trains_a_plain_adapter_on_the_same_draws():
    one, other = Net(), Net()
    first = train(one, regularizer=StepwiseVariationRegularizer(0.0))
    second = train(other, regularizer=StepwiseVariationRegularizer(1e-12))
    assert not first.variations and second.variations
    assert first.losses == pytest.approx(second.losses, rel=1e-4)


def test_lazy_regularization_skips_passes():
    assert len(train(Net(), regularizer=StepwiseVariationRegularizer(every=4)).variations) == 2


def test_the_regularizer_evens_the_variation_out():
    spread = {}
    for weight in (0.0, 3.0):
        net = Net()
        train(net, steps=150, regularizer=StepwiseVariationRegularizer(weight), config=config(4), lr=2e-2)
        reg, noise = StepwiseVariationRegularizer(), torch.randn(512, 8).requires_grad_()
        t = torch.randint(20, (512,), generator=torch.Generator().manual_seed(1))
        abar = Schedule().alphas_cumprod[t]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            z = abar.sqrt()[:, None] * torch.randn(512, 8) + (1 - abar).sqrt()[:, None] * noise
            stats = reg(predict_x0(net.eval()(z, t), z, t, Schedule()), noise, abar)[1]
        spread[weight] = stats.std
    assert spread[3.0] < 0.95 * spread[0.0]


def test_saved_adapters_load_and_foreign_files_are_refused(tmp_path):
    net = Net()
    train(net, tmp_path, steps=3)
    again = Net()
    load_smooth_lora(again, tmp_path)
    z, t = torch.randn(5, 8), torch.arange(5)
    assert torch.equal(again.eval()(z, t), net.eval()(z, t))
    with pytest.raises(ValueError, match="`adapter` must be a name that the model has no adapter of; got 'smooth'"):
        load_smooth_lora(again, tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_smooth_lora(Net(), tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="the model has no layer `to_q`|the model has no layer `out`"):
        load_smooth_lora(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    smaller = Net()
    smaller.to_q, smaller.to_v, smaller.out = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match="must have shape"):
        load_smooth_lora(smaller, tmp_path)

    class TinyUNet(Net):
        pass

    with pytest.raises(CheckpointError, match="the adapter of another model"):
        load_smooth_lora(TinyUNet(), tmp_path)
    with pytest.raises(ValueError, match=re.escape("`adapter` must be one of the model's (none); got 'smooth'")):
        save_smooth_lora(Net(), tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"steps": 0}, "`steps` must be at least 1; got 0"),
        ({"accumulate": 0}, "`accumulate` must be at least 1; got 0"),
        ({"save_every": 0}, "`save_every` must be at least 1; got 0"),
        ({"share": 0}, "`share` must be in (0, 1]; got 0"),
        ({"share": 1.1}, "`share` must be in (0, 1]; got 1.1"),
        ({"lr": 0}, "`lr and clip` must be > 0"),
        ({"weight_decay": -1}, "`weight_decay` must be >= 0; got -1"),
        ({"method": "forward"}, "`method` must be 'vjp', 'jvp' or 'difference'; got 'forward'"),
        ({"config": smooth_lora_config(2, ["nowhere"])}, "`target_modules` must be names of the model's layers"),
    ],
)
def test_bad_settings_of_training(changed, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(Net(), **changed)


def test_bad_models_and_batches():
    with pytest.raises(ValueError, match="`model` must be in float32 or bfloat16"):
        train(Net().half())
    with pytest.raises(ValueError, match="`batches` must be an iterable that can be begun anew"):
        train_smooth_lora(Net(), [], Schedule(), steps=1, config=config())
    with pytest.raises(ValueError, match="train_smooth_lora, step 0: `batches` must be such that the loss is finite"):
        train_smooth_lora(Net(), [(torch.full((2, 8), torch.nan), {})], Schedule(), steps=1, config=config())
    with pytest.raises(ValueError, match="`rank` must be at least 1; got 0"):
        smooth_lora_config(0)


# -- the regularizer ----------------------------------------------------------------------------------------------


def test_bad_input_of_the_regularizer():
    reg, noise, abar = StepwiseVariationRegularizer(), torch.randn(3, 8), torch.full((3,), 0.5)
    ready = noise.clone().requires_grad_()
    with pytest.raises(ValueError, match="`noise` must be of requires_grad=True before the noisy sample is made of it"):
        reg(noise * 2, noise, abar)
    with pytest.raises(ValueError, match="`pred_x0` must be made from `noise`"):
        reg(noise * 2, ready, abar)
    with pytest.raises(ValueError, match="`pred_x0` must be made from `noise`"):
        reg(2 * noise.clone().requires_grad_(), ready, abar)
    with pytest.raises(ValueError, match=re.escape("`alphas_cumprod_t` must be of shape (3,); got (2,)")):
        reg(2 * ready, ready, abar[:2])
    with pytest.raises(ValueError, match=re.escape("`alphas_cumprod_t` must be in [0, 1]")):
        reg(2 * ready, ready, 3 * abar)
    with pytest.raises(ValueError, match=re.escape("`pred_x0` must be of the noise's shape (3, 8); got (3, 4)")):
        reg(ready[:, :4], ready, abar)
    with pytest.raises(ValueError, match="`pred_x0` must be of float32 or bfloat16"):
        reg(ready.half(), ready, abar)
    with pytest.raises(ValueError, match="`step` must be > 0 or None; got 0"):
        reg.along(torch.sin, noise, abar, step=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": -1}, "`weight` must be a finite number >= 0; got -1"),
        ({"decay": 0}, "`decay` must be in (0, 1]; got 0"),
        ({"scope": "time"}, "`scope` must be 'global' or 'per_timestep'; got 'time'"),
        ({"max_ratio": 0}, "`max_ratio` must be > 0 or None; got 0"),
        ({"buckets": 0}, "`buckets` must be an int >= 1; got 0"),
        ({"every": 1.5}, "`every` must be an int >= 1; got 1.5"),
    ],
)
def test_bad_settings_of_the_regularizer(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        StepwiseVariationRegularizer(**settings)


def test_fused_attention_is_refused_with_its_cure():
    noise = torch.randn(2, 2, 8, 16).requires_grad_()
    abar = torch.full((2,), 0.5)
    made = nn.functional.scaled_dot_product_attention(noise, noise, noise)
    with pytest.raises(ValueError, match=re.escape("sdpa_kernel(SDPBackend.MATH)")):
        StepwiseVariationRegularizer()(made, noise, abar)
    checkpointed = torch.utils.checkpoint.checkpoint(torch.sin, noise, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        StepwiseVariationRegularizer()(checkpointed, noise, abar)
    lenient = torch.utils.checkpoint.checkpoint(torch.sin, noise, use_reentrant=False)
    assert StepwiseVariationRegularizer()(lenient, noise, abar)[0].requires_grad


def test_a_vanishing_gradient_gives_no_nan():
    weight = torch.ones(8, requires_grad=True)
    noise = torch.randn(3, 8).requires_grad_()
    loss, _ = StepwiseVariationRegularizer()((weight * noise**3) * 0, noise, torch.full((3,), 0.5))
    (found,) = torch.autograd.grad(loss, weight)
    assert bool(found.isfinite().all())


RANK = """
import sys, torch
from planish.diffusion import StepwiseVariationRegularizer
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
reg = StepwiseVariationRegularizer(decay=0.5, normalize_probe=True)
for scale in (1.0, 3.0):
    noise = torch.ones(2 + 2 * rank, 4).requires_grad_()
    reg(scale * (1 + rank) * noise, noise, torch.full((2 + 2 * rank,), 0.75))
print(float(reg.mean_variation))
torch.distributed.destroy_process_group()
"""


def test_ranks_share_the_mean(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    found = [float(rank.communicate(timeout=120)[0]) for rank in ranks]
    first = 0.5 * (2 * 1 + 4 * 2) / 6  # two samples of variation 0.5, four of twice that
    assert found == [pytest.approx(first + 0.5 * (3 * first - first), rel=1e-5)] * 2
