"""What is exact in Smooth Diffusion: variation of linear models, running means, arcs, inversion."""

import math

import pytest
import torch

from planish.diffusion import (
    NullTextInverter,
    StepwiseVariationRegularizer,
    ddim_invert,
    ddim_sample,
    edit_by_prompt_switch,
    istd,
    predict_x0,
    slerp,
)

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch, at its first jvp
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Schedule:
    """Stable Diffusion's schedule of `count` levels in diffusers' form, visited evenly."""

    def __init__(self, kind="epsilon", count=200, final=1.0):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
        self.config = {"num_train_timesteps": count, "prediction_type": kind}
        self.timesteps, self.final_alpha_cumprod = torch.arange(count).flip(0), final
        if kind != "flow_prediction":
            self.alphas_cumprod = (1 - betas).cumprod(0)[:: 1000 // count]

    def set_timesteps(self, steps):
        count = self.config["num_train_timesteps"]
        first = 1 if self.config["prediction_type"] == "flow_prediction" else 0
        self.timesteps = torch.arange(steps).flip(0) * (count // steps) + first


def draws(seed):
    return torch.Generator().manual_seed(seed)


class Linear:
    """x0hat = J noise, row by row."""

    def __init__(self, dim, *, orthogonal=False):
        self.J = torch.randn(dim, dim, dtype=F64, generator=draws(1))
        if orthogonal:
            self.J = 1.7 * torch.linalg.qr(self.J)[0]

    def __call__(self, noise):
        return noise @ self.J.T


def inputs(batch=64, dim=6, abar=0.6):
    noise = torch.randn(batch, dim, dtype=F64, generator=draws(2)).requires_grad_()
    return noise, torch.full((batch,), abar, dtype=F64)


# -- the regularizer ----------------------------------------------------------------------------------------------


def probe_of(noise, seed):
    return torch.randn(len(noise), noise[0].numel(), generator=draws(seed), dtype=F64) / math.sqrt(noise[0].numel())


def test_variation_of_a_linear_model_is_its_jacobian_on_the_probe():
    J = Linear(6)
    noise, abar = inputs()
    reg = StepwiseVariationRegularizer(max_ratio=None).double()
    _, stats = reg(J(noise), noise, abar, generator=draws(3))
    wanted = math.sqrt(0.4) * (probe_of(noise, 3) @ J.J).norm(dim=1)
    assert torch.allclose(stats.variation, wanted, atol=1e-10)


def test_the_models_own_formula_gives_the_jacobian_of_a_linear_predictor():
    # eps = A z: d x0hat / d noise = s / a (I - s A)
    sched, t = Schedule(), 120
    A = 0.3 * torch.randn(5, 5, dtype=F64, generator=draws(4))
    abar = sched.alphas_cumprod[t]
    a, s = abar.sqrt(), (1 - abar).sqrt()
    noise = torch.randn(16, 5, dtype=F64, generator=draws(5)).requires_grad_()
    z = a * torch.randn(16, 5, dtype=F64, generator=draws(6)) + s * noise
    x0hat = predict_x0(z @ A.T, z, t, sched)
    reg = StepwiseVariationRegularizer(max_ratio=None).double()
    _, stats = reg(x0hat, noise, abar.expand(16), generator=draws(7))
    J = s / a * (torch.eye(5, dtype=F64) - s * A)
    assert torch.allclose(stats.variation, s * (probe_of(noise, 7) @ J).norm(dim=1), atol=1e-10)


@pytest.mark.parametrize("way", ["vjp", "jvp", "difference"])
def test_the_mean_square_of_the_variation_is_the_jacobians_size(way):
    J = Linear(6)
    noise, abar = inputs(batch=20_000)
    reg = StepwiseVariationRegularizer().double()
    if way == "vjp":
        _, stats = reg(J(noise), noise, abar, generator=draws(8))
    else:
        _, _, stats = reg.along(J, noise.detach(), abar, step=None if way == "jvp" else 0.1, generator=draws(8))
    wanted = 0.4 * float(J.J.square().sum()) / 6
    assert float(stats.variation.square().mean()) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("way", ["vjp", "jvp", "difference"])
def test_an_orthogonal_jacobian_is_not_penalized(way):
    J = Linear(6, orthogonal=True)
    noise, abar = inputs()
    reg = StepwiseVariationRegularizer(normalize_probe=True).double()
    if way == "vjp":
        loss, stats = reg(J(noise), noise, abar)
    else:
        _, loss, stats = reg.along(J, noise.detach(), abar, step=None if way == "jvp" else 0.1)
    assert float(loss) < 1e-20
    assert torch.allclose(stats.variation, torch.full((64,), 1.7 * math.sqrt(0.4), dtype=F64), atol=1e-10)


def test_forward_mode_and_differences_agree_on_a_curved_model():
    noise, abar = inputs()
    reg = StepwiseVariationRegularizer().double()
    fine = reg.along(lambda e: (2 * e).tanh(), noise.detach(), abar, step=1e-6, generator=draws(1))[2].variation
    exact = reg.along(lambda e: (2 * e).tanh(), noise.detach(), abar, step=None, generator=draws(1))[2].variation
    assert torch.allclose(fine, exact, atol=1e-5)


def test_the_losss_gradient_is_right():
    noise = torch.randn(5, 3, dtype=F64, generator=draws(9))
    abar = torch.linspace(0.2, 0.8, 5, dtype=F64)

    def loss(weight):
        reg = StepwiseVariationRegularizer(decay=0.3).double()
        reg.mean_variation.fill_(0.5)
        reg.seen.fill_(True)
        held = noise.clone().requires_grad_()
        return reg((held @ weight).tanh() * held.sin(), held, abar, generator=draws(10))[0]

    assert torch.autograd.gradcheck(loss, torch.randn(3, 3, dtype=F64, generator=draws(11)).requires_grad_())


def test_a_model_without_parameters_in_its_jacobian_gets_no_gradient():
    bias = torch.randn(6, dtype=F64, requires_grad=True)
    noise, abar = inputs()
    loss, _ = StepwiseVariationRegularizer().double()(3 * noise + bias, noise, abar)
    loss.backward(inputs=[bias, noise]) if loss.grad_fn is not None else None
    assert bias.grad is None or float(bias.grad.abs().max()) == 0


def test_scaling_the_prediction_scales_the_variation():
    J = Linear(6)
    noise, abar = inputs()
    one, four = (
        StepwiseVariationRegularizer()(c * J(noise), noise, abar, generator=draws(3))[1].variation for c in (1, 4)
    )
    assert torch.allclose(4 * one, four, rtol=1e-10)


@pytest.mark.parametrize("scope", ["global", "per_timestep"])
def test_the_running_mean_follows_its_recursion_and_survives_saving(scope):
    J = Linear(6)
    reg = StepwiseVariationRegularizer(decay=0.25, scope=scope, buckets=4).double()
    levels = torch.tensor([0.02, 0.3, 0.9], dtype=F64)  # noise levels of three of the four buckets
    ratios = [float(lv / (1 - lv**2).sqrt()) for lv in levels]
    bucket = [max(0, int(4 * math.log(r / 0.05) / math.log(400))) for r in ratios]
    assert bucket == [0, 1, 2]
    kept = [None] * 4
    for step in range(5):
        noise = torch.randn(3, 6, dtype=F64, generator=draws(step)).requires_grad_()
        _, stats = reg(J(noise), noise, 1 - levels**2, generator=draws(50 + step))
        groups = [[0, 1, 2]] if scope == "global" else [[i] for i in range(3)]
        for group in groups:
            at = 0 if scope == "global" else bucket[group[0]]
            mean = float(stats.variation[group].mean())
            kept[at] = mean if kept[at] is None else kept[at] + 0.25 * (mean - kept[at])
    found = [float(reg.mean_variation[i]) if reg.seen[i] else None for i in range(len(reg.seen))]
    assert found == pytest.approx(kept[: len(found)], abs=1e-12)
    again = StepwiseVariationRegularizer(decay=0.25, scope=scope, buckets=4).double()
    again.load_state_dict(reg.state_dict())
    assert torch.equal(again.mean_variation, reg.mean_variation) and torch.equal(again.seen, reg.seen)
    reg.eval()
    reg(J(noise), noise, 1 - levels**2)
    assert torch.equal(again.mean_variation, reg.mean_variation)


def test_the_ratio_is_clamped_and_the_published_schedule_is_not_touched():
    J = Linear(6)
    noise, _ = inputs(batch=2)
    worst = float(Schedule(count=1000).alphas_cumprod[-1])
    assert math.sqrt((1 - worst) / worst) == pytest.approx(14.6, abs=0.05)
    abar = torch.tensor([worst, 4e-5], dtype=F64)
    free, clamped = (
        StepwiseVariationRegularizer(max_ratio=r).double()(J(noise), noise, abar, generator=draws(3))[1].variation
        for r in (None, 15.0)
    )
    assert torch.allclose(free[0], clamped[0], rtol=1e-12)
    assert float(clamped[1] / free[1]) == pytest.approx(15 / math.sqrt((1 - 4e-5) / 4e-5), rel=1e-9)


def test_times_without_signal_are_left_out():
    J = Linear(6)
    noise, _ = inputs(batch=3)
    reg = StepwiseVariationRegularizer().double()
    _, stats = reg(J(noise), noise, torch.tensor([0.5, 0.5, 0.0], dtype=F64), generator=draws(3))
    assert float(reg.mean_variation) == pytest.approx(float(stats.variation[:2].mean()), abs=1e-12)
    assert stats.penalty == pytest.approx(float((stats.variation[:2] - reg.mean_variation).square().mean()), abs=1e-12)


def test_lazy_regularization_keeps_the_expected_loss():
    J = Linear(6)
    noise, abar = inputs()
    one, four = (
        StepwiseVariationRegularizer(2.0, every=k)(J(noise), noise, abar, generator=draws(3))[0] for k in (1, 4)
    )
    assert float(four) == pytest.approx(4 * float(one))
    assert [StepwiseVariationRegularizer(every=3).due(i) for i in range(4)] == [True, False, False, True]
    assert not StepwiseVariationRegularizer(0.0).due(0)


# -- prediction types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction_gives_back_the_sample(kind):
    from planish.diffusion.prediction import levels, target

    sched = Schedule(kind)
    x0, noise = (torch.randn(4, 2, 3, dtype=F64, generator=draws(i)) for i in (1, 2))
    t = torch.tensor([0, 50, 100, 199]) + (kind == "flow_prediction")
    a, s = levels(sched, t, x0)
    z = a * x0 + s * noise
    assert torch.allclose(predict_x0(target(kind, x0, noise, a, s), z, t, sched), x0, atol=1e-10)


# -- arcs ---------------------------------------------------------------------------------------------------------


def test_slerp_has_its_ends_equal_angles_and_the_norm():
    a, b = (torch.randn(3, 4, 5, dtype=F64, generator=draws(i)) for i in (1, 2))
    b = b / b.flatten(1).norm(dim=1).view(-1, 1, 1) * a.flatten(1).norm(dim=1).view(-1, 1, 1)
    walk = slerp(a, b, torch.linspace(0, 1, 11)).flatten(2)
    assert torch.allclose(walk[0], a.flatten(1), atol=1e-12) and torch.allclose(walk[-1], b.flatten(1), atol=1e-12)
    norms = walk.norm(dim=2)
    assert torch.allclose(norms, norms[:1].expand_as(norms), atol=1e-10)
    angles = ((walk[1:] * walk[:-1]).sum(2) / (norms[1:] * norms[:-1])).acos()
    assert torch.allclose(angles, angles[:1].expand_as(angles), atol=1e-7)


def test_slerp_of_near_noises_is_a_straight_line():
    a = torch.randn(2, 6, dtype=F64, generator=draws(1))
    b = a + 1e-4 * torch.randn(2, 6, dtype=F64, generator=draws(2))
    assert torch.allclose(slerp(a, b, 0.3), 0.7 * a + 0.3 * b, atol=1e-12)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-15)


def test_chords_of_an_orthogonal_map_are_equal_and_a_step_is_seen():
    pairs = torch.randn(2, 5, 40, dtype=F64, generator=draws(1))
    pairs = pairs / pairs.norm(dim=2, keepdim=True)
    Q = torch.linalg.qr(torch.randn(40, 40, dtype=F64, generator=draws(2)))[0]
    even = istd(lambda z: z @ Q, pairs)
    assert even.istd < 1e-10 and even.cv < 1e-10 and even.max_over_mean == pytest.approx(1, abs=1e-9)
    jump = istd(lambda z: z @ Q + (z[:, :1] > 0), pairs)
    assert jump.istd > 0.1 and jump.max_over_mean > 1.5
    assert jump.per_pair.shape == (5, 10)


def test_istd_scales_with_the_range_and_its_companions_do_not():
    pairs = torch.randn(2, 6, 12, dtype=F64, generator=draws(1))
    one, bytes_ = (istd(lambda z, c=c: c * z.tanh(), pairs, data_range=r) for c, r in ((1, 1.0), (3, 1.0)))
    assert bytes_.istd == pytest.approx(3 * one.istd) and bytes_.mean_step == pytest.approx(3 * one.mean_step)
    assert bytes_.cv == pytest.approx(one.cv) and bytes_.max_over_mean == pytest.approx(one.max_over_mean)
    scaled = istd(lambda z: 255 * z.tanh(), pairs, data_range=255)
    assert scaled.istd == pytest.approx(one.istd)


# -- inversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_is_exact_where_the_prediction_does_not_read_the_sample(kind):
    sched = Schedule(kind, final=0.9991)

    def predict(z, t):
        return (0.2 + t.double()[:, None] / 400).expand_as(z) * torch.arange(3)

    x0 = torch.randn(2, 3, dtype=F64, generator=draws(1))
    back = ddim_sample(predict, ddim_invert(predict, x0, sched, steps=20)[-1], sched, steps=20)
    assert torch.allclose(back, x0, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_inversions_error_falls_like_one_over_steps(kind):
    sched = Schedule(kind, count=1000, final=0.9991)
    A = 0.3 * torch.randn(3, 3, dtype=F64, generator=draws(2))
    x0 = torch.randn(2, 3, dtype=F64, generator=draws(1))

    def error(steps):
        noise = ddim_invert(lambda z, t: z @ A, x0, sched, steps=steps)[-1]
        return float((ddim_sample(lambda z, t: z @ A, noise, sched, steps=steps) - x0).norm())

    assert error(100) / error(200) == pytest.approx(2, rel=0.2)
    assert error(1000) < 0.02 * float(x0.norm())


def toy_inverter(**changed):
    A = 0.2 * torch.randn(3, 3, dtype=F64, generator=draws(5))
    settings = {"steps": 10, "key": "e", "guidance_scale": 3.0, "lr": 0.1, "inner_steps": 60, "tolerance": 1e-9}
    return NullTextInverter(lambda z, t, e: z @ A + e, Schedule(), **settings | changed)


def test_null_text_inversion_brings_guided_sampling_back_and_equal_prompts_change_nothing():
    x0, (one, two) = torch.ones(2, 3, dtype=F64), torch.randn(2, 2, 3, dtype=F64, generator=draws(3))
    null = {"e": torch.zeros(2, 3, dtype=F64)}
    inverter = toy_inverter()
    found = inverter.invert(x0, {"e": one}, null)
    fitted = inverter.reconstruct(found, {"e": one})
    plain = ddim_sample(
        inverter.model, found.noise, inverter.scheduler, cond={"e": one}, null_cond=null, steps=10, guidance_scale=3
    )
    assert float((fitted - x0).norm()) < 0.05 * float((plain - x0).norm())
    same = edit_by_prompt_switch(inverter, found, {"e": one}, {"e": one}, switch_at=0.5)
    assert torch.equal(same, fitted)
    edits = [edit_by_prompt_switch(inverter, found, {"e": one}, {"e": two}, switch_at=r) for r in (0, 0.3, 0.6, 1)]
    away = [float((edit - fitted).norm()) for edit in edits]
    assert away[0] == 0 and away == sorted(away)


def test_images_may_share_the_null_embedding():
    x0, cond = torch.tensor([[1.0], [-1.0]], dtype=F64).expand(2, 3), {"e": torch.ones(2, 3, dtype=F64)}
    found = toy_inverter().invert(x0, cond, {"e": torch.zeros(1, 3, dtype=F64)})
    assert found.null_embeddings.shape == (10, 1, 3)
    assert toy_inverter().reconstruct(found, cond).shape == (2, 3)
