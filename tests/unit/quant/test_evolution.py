"""The optimizer, the losses and the memory of runs that Evol-Q is made of."""

import math

import pytest
import torch
from torch import nn

from planish.quant.evolution import RegularizedTournament
from planish.quant.fitness import cosine, infonce, kl, mse
from planish.quant.replay import Replay, Trace


def rows(n=10, c=6, seed=0):
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(seed, steps=60, **options):
    search = RegularizedTournament(
        torch.tensor([3.0, 0.5, 1.0]), generator=torch.Generator().manual_seed(seed), **options
    )
    path = []
    for _ in range(steps):
        points = search.ask(2)
        search.tell(points, (points - 1).square().sum(-1))
        path.append(search.best[1])
    return search, path


@pytest.mark.parametrize("options", [
    {}, {"mutation": 0.3, "adapt": True}, {"mutation": 0.1, "relative": True, "share": 0.5},
    {"population": 1, "tournament": 1, "mutation": 0.5},
])  # fmt: skip
def test_the_best_never_gets_worse_and_a_seed_decides_all(options):
    state = torch.get_rng_state()
    first, path = run(0, **options)
    assert path == sorted(path, reverse=True)
    again, same = run(0, **options)
    assert path == same
    assert torch.equal(first.best[0], again.best[0])
    assert not torch.equal(first.best[0], run(1, **options)[0].best[0])
    assert torch.equal(state, torch.get_rng_state())


def test_the_start_is_asked_first_unless_it_is_known():
    x0 = torch.tensor([2.0, 4.0])
    assert torch.equal(RegularizedTournament(x0).ask()[0], x0.double())
    known = RegularizedTournament(x0, fitness=1.0)
    assert known.best[1] == 1.0
    assert not torch.equal(known.ask()[0], x0.double())
    assert RegularizedTournament(x0).best[1] == math.inf


def test_a_mutation_stays_within_its_size_and_bounds():
    x0 = torch.tensor([1e-4, 1.0, 100.0])
    absolute = RegularizedTournament(x0, fitness=0.0, mutation=1e-3).ask(500)
    assert (absolute - x0).abs().max() <= 1e-3
    assert absolute.min() >= 0  # the magnitude, as published
    relative = RegularizedTournament(x0, fitness=0.0, mutation=0.03, relative=True).ask(500)
    assert (relative / x0 - 1).abs().max() <= 0.03 + 1e-12
    assert (relative / x0 - 1).abs().amax(0).min() > 0.029  # narrow channels move as much as wide ones
    still = RegularizedTournament(x0, fitness=0.0, mutation=0.0).ask(3)
    assert torch.equal(still, x0.double().expand(3, 3))
    bounded = RegularizedTournament(x0, fitness=0.0, mutation=1e-3, bounds=(x0.double(), 200.0)).ask(50)
    assert (bounded >= x0.double()).all()
    few = RegularizedTournament(torch.ones(1000), fitness=0.0, mutation=0.1, share=0.1).ask()[0]
    assert 50 < (few != 1).sum() < 200


def test_the_step_follows_success():
    search = RegularizedTournament(torch.ones(2), fitness=1.0, mutation=0.1, adapt=True)
    search.tell(search.ask(), [0.5])
    assert search.step == pytest.approx(0.15)
    for _ in range(4):
        search.tell(search.ask(), [2.0])
    assert search.step == pytest.approx(0.1)


def test_equal_fitness_and_given_up_points_are_no_trouble():
    search = RegularizedTournament(torch.ones(2), fitness=1.0, population=3, tournament=2)
    search.tell(search.ask(4), [1.0, 1.0, math.inf, 1.0])
    assert search.best[1] == 1.0
    with pytest.raises(
        ValueError, match=r"RegularizedTournament.tell: `fitnesses` must be 2 numbers; got \[nan, 1.0\]"
    ):
        search.tell(search.ask(2), [math.nan, 1.0])


@pytest.mark.parametrize(("options", "sentence"), [
    ({"x0": torch.ones(2, 2)}, r"`x0` must be a vector of finite values; got \(2, 2\)"),
    ({"x0": torch.tensor([math.inf])}, r"`x0` must be a vector of finite values"),
    ({"population": 0}, r"`population` must be an integer of at least 1; got 0"),
    ({"tournament": 0.5}, r"`tournament` must be an integer of at least 1; got 0.5"),
    ({"mutation": -1.0}, r"`mutation` must be a finite number of at least 0; got -1.0"),
    ({"share": 0.0}, r"`share` must be a float in \(0, 1\]; got 0.0"),
    ({"fitness": math.nan}, r"`fitness` must be a number; got nan"),
])  # fmt: skip
def test_bad_arguments_of_the_optimizer(options, sentence):
    x0 = options.pop("x0", torch.ones(2))
    with pytest.raises(ValueError, match=f"RegularizedTournament: {sentence}"):
        RegularizedTournament(x0, **options)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_infonce_is_the_cross_entropy_of_cosines(temperature):
    q, k = rows(seed=1), rows(seed=2)
    cosines = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).T
    wanted = 2 * temperature * nn.functional.cross_entropy(cosines / temperature, torch.arange(10))
    torch.testing.assert_close(infonce(q, k, temperature), wanted)


def test_infonce_has_the_stated_invariances():
    q, k, order = rows(seed=1), rows(seed=2), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    value = infonce(q, k)
    lengths = rows(c=1, seed=3).abs() + 0.1
    torch.testing.assert_close(infonce(lengths * q, 7 * k), value)
    torch.testing.assert_close(infonce(q[order], k[order]), value)
    assert infonce(k.roll(1, 0), k) > infonce(k, k)


@pytest.mark.parametrize("n", [2, 5])
def test_infonce_of_orthonormal_rows_has_a_closed_value(n):
    eye = torch.eye(n, dtype=torch.float64)
    wanted = 6 * math.log(1 + (n - 1) * math.exp(-1 / 3))
    assert infonce(eye, eye).item() == pytest.approx(wanted, rel=1e-12)


def test_many_rows_are_contrasted_in_parts():
    q, k = rows(300, seed=1), rows(300, seed=2)
    parts = [infonce(a, b).item() for a, b in zip(q.tensor_split(2), k.tensor_split(2), strict=True)]
    assert infonce(q, k).item() == pytest.approx(sum(parts) / 2)


def test_other_losses_are_zero_for_what_is_equal_and_mean_over_rows():
    q, k = rows(seed=1), rows(seed=2)
    for loss in (mse, kl, cosine):
        assert loss(q, q).item() == pytest.approx(0, abs=1e-12)
        torch.testing.assert_close(loss(q.repeat(3, 1), k.repeat(3, 1)), loss(q, k))
        assert loss(q, k) > 0
    p, r = k.softmax(-1), q.softmax(-1)
    torch.testing.assert_close(kl(q, k), (p * (p / r).log()).sum(-1).mean())


def test_infonce_refuses_what_it_cannot_contrast():
    with pytest.raises(ValueError, match=r"infonce: `outputs` must be at least 2 rows; got 1\."):
        infonce(rows(1), rows(1))
    with pytest.raises(ValueError, match=r"infonce: `temperature` must be a float above 0; got 0\."):
        infonce(rows(), rows(), 0.0)


class Shared(nn.Module):
    """Calls one layer twice, adds a residual, and writes into what a layer returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.Hardswish(inplace=True)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.act(self.a(x)) + x
        y = self.act(self.b(self.a(y))) + y
        return self.a(self.c(y)) + y


@pytest.mark.parametrize("names", [["c"], ["b"], ["b", "c"], ["a"]])
def test_a_replayed_run_is_the_whole_run_bit_for_bit(names):
    net, batches = Shared(), [rows(3, 4, seed=i).float() for i in range(2)]
    layers = [net.get_submodule(n) for n in names]
    replay = Replay(Trace.of(net, lambda: net(batches[0])), layers)
    for i, x in enumerate(batches):
        with replay.recording(i):
            assert torch.equal(net(x), net(x))
    for layer in layers:
        layer.weight.data += 1
    counted = []
    handle = net.a.register_forward_pre_hook(lambda *_: counted.append(1))
    for i, x in enumerate(batches):
        wanted = net(x)
        for _ in range(2):
            with replay.replaying(i):
                assert torch.equal(net(x), wanted)
    handle.remove()
    assert "forward" not in vars(net.a)


def test_what_comes_before_is_not_computed_again():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    x = torch.ones(1, 4)
    replay = Replay(Trace.of(net, lambda: net(x)), [net[2]])
    with replay.recording(0):
        y = net(x)
    for early in (net[0], net[1]):
        early.weight.data.fill_(math.nan)
    with replay.replaying(0):
        assert torch.equal(net(x), y)
    replay.forget()
    with replay.replaying(0):
        assert net(x).isnan().all()


def test_what_cannot_be_copied_is_computed():
    class Odd(nn.Module):
        def forward(self, x):
            return iter((x,))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.last = Odd(), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(next(self.odd(x)))

    net, x = Net(), torch.ones(1, 4)
    replay = Replay(Trace.of(net, lambda: net(x)), [net.last])
    with replay.recording(0):
        y = net(x)
    with replay.replaying(0):
        assert torch.equal(net(x), y)
