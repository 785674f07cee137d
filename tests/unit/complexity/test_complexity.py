"""Counting, tables and pictures of the hardness room; bad input."""

import re

import pytest
import torch

from planish.complexity import (
    ChainGame,
    Circuit,
    CountingOracle,
    StochasticOracle,
    ZeroChain,
    bench,
    geometric_queries,
    grover_circuit,
    query_lower_bound,
    random_circuit,
)

F64 = torch.float64


def test_counting_oracle_counts_points_and_gives_what_was_asked():
    f = ZeroChain(3)
    for order, shapes in ((0, [(2,)]), (1, [(2,), (2, 3)]), (2, [(2,), (2, 3), (2, 3, 3)])):
        oracle = CountingOracle(f, order)
        answers = oracle(torch.ones(2, 3, dtype=F64))
        assert [a.shape for a in answers] == shapes
        assert (oracle.queries, oracle.calls, len(oracle.progress)) == (2, 1, 2)


def test_counting_oracle_takes_any_function():
    oracle = CountingOracle(lambda x: (x**4).sum(), 2)
    value, grad, hessian = oracle(torch.tensor([1.0, 2.0]))
    assert value == 17 and grad.tolist() == [4, 32]
    assert torch.equal(hessian, torch.diag(torch.tensor([12.0, 48.0])))


def test_rotation_is_orthonormal_and_repeats_with_its_generator():
    a, b = (ZeroChain(3, rotation="haar", dim=9, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a.basis, b.basis)
    assert torch.allclose(a.basis.mT @ a.basis, torch.eye(3, dtype=F64), atol=1e-14)


def test_scores_tell_who_gave_up_and_draw(monkeypatch):
    import matplotlib as mpl

    mpl.use("Agg")
    told = []
    scores = bench(
        {"GD": lambda p: torch.optim.SGD(p, lr=1 / 20), "timid": lambda p: torch.optim.SGD(p, lr=1e-6)},
        (2, 4),
        most=50,
        progress=lambda *args: told.append(args),
    )
    assert scores.worst("timid") == float("inf") and scores.slope("timid") != scores.slope("timid")
    assert "timid" in str(scores) and " - " in str(scores)
    assert told[-1] == ("timid", 4, 4)
    assert {text.get_text() for text in scores.plot().texts} >= {"GD"}


def test_an_optimizer_that_does_not_ask_ends_the_run():
    class Idle(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            return None

    (row,) = bench({"idle": Idle}, (3,)).rows
    assert row.queries is None and row.most_progress == 0


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: ZeroChain(0), "ZeroChain: `length` must be at least 1; got 0."),
        (lambda: ZeroChain(3, order=5), "ZeroChain: `order` must be 1, 2, 3 or 4; got 5."),
        (lambda: ZeroChain(3, rotation="so"), "ZeroChain: `rotation` must be 'none' or 'haar'; got 'so'."),
        (lambda: ZeroChain(3, rotation="haar"), "ZeroChain: `generator` must be a torch.Generator"),
        (lambda: ZeroChain(3, dim=4), "ZeroChain: `dim` must be 3; got 4."),
        (lambda: ZeroChain(3, rotation="haar", dim=2, generator=torch.Generator()), "`dim` must be at least 3; got 2."),
        (lambda: ZeroChain(3, eps=0), "ZeroChain: `eps` must be above 0; got 0.0."),
        (lambda: ZeroChain(3, lipschitz=float("nan")), "ZeroChain: `lipschitz` must be above 0; got nan."),
        (lambda: ZeroChain(3).grad(torch.zeros(4, dtype=F64)), "`x` must be float64 with last axis 3"),
        (lambda: ZeroChain(3).value(torch.zeros(3)), "`x` must be float64 with last axis 3; got 'torch.float32 (3,)'."),
        (lambda: ZeroChain(3).derivative(torch.zeros(3, dtype=F64), []), "`directions` must be at least one tensor"),
        (lambda: ZeroChain.for_target(1.0), "`eps` must be small enough for one door"),
        (lambda: CountingOracle(ZeroChain(2), 3), "CountingOracle: `order` must be 0, 1 or 2; got 3."),
        (lambda: StochasticOracle(ZeroChain(2), 0), "StochasticOracle: `success` must be in (0, 1]; got 0."),
        (
            lambda: StochasticOracle(ZeroChain(2, rotation="haar", generator=torch.Generator()), 0.5),
            "StochasticOracle: `chain` must be plain, not rotated; got 'haar'.",
        ),
        (lambda: geometric_queries(0, 0.5), "`length` must be at least 1"),
        (lambda: geometric_queries(3, 1.5), "`success` must be in (0, 1]; got 1.5."),
        (lambda: query_lower_bound(0), "query_lower_bound: `eps` must be above 0; got 0."),
        (lambda: query_lower_bound(-1, "stochastic"), "query_lower_bound: `eps` must be above 0; got -1."),
        (lambda: query_lower_bound(0.1, "sure"), "query_lower_bound: `setting` must be one of order_p"),
        (lambda: query_lower_bound(0.1, model="oracle"), "query_lower_bound: `model` must be"),
        (lambda: query_lower_bound(0.1, sigma=0), "query_lower_bound: `sigma` must be above 0; got 0."),
        (lambda: query_lower_bound(0.1, order=7), "query_lower_bound: `order` must be 1, 2, 3 or 4; got 7."),
        (lambda: query_lower_bound(0.1, "stochastic", order=2), "`order` must be 1 for stochastic gradients; got 2."),
        (lambda: ChainGame(1, 3), "ChainGame: `n_keys` must be at least 2; got 1."),
        (lambda: ChainGame(3, 0), "ChainGame: `length` must be at least 1; got 0."),
        (lambda: ChainGame(32, 4), "amplitudes together; got '1185921 points x"),
        (lambda: ChainGame(40, 6), "amplitudes together; got '4750104241 points'."),
        (lambda: ChainGame(3, 2).answers((1, 4)), "ChainGame: `chain` must be 2 keys in [1, 3]; got (1, 4)."),
        (lambda: random_circuit(ChainGame(2, 1), -1, torch.Generator()), "`n_queries` must be at least 0; got -1."),
        (lambda: grover_circuit(ChainGame(2, 1), -1), "grover_circuit: `iterations` must be at least 0; got -1."),
        (lambda: ChainGame(2, 1).hybrid_report(Circuit((), lambda s: s), []), "`chains` must be at least one"),
        (
            lambda: ChainGame(2, 1).hybrid_report(grover_circuit(ChainGame(2, 1), 1), [(1,)]),
            "`circuit` must be one of at most 1 queries; got 2.",
        ),
        (lambda: Circuit((), lambda s: s, (True,)), "Circuit: `inverse` must be one flag a query, 0; got (True,)."),
        (lambda: bench({}), "bench: `optimizers` must be at least one; got {}."),
        (lambda: bench({"a": torch.optim.SGD}, ()), "bench: `lengths` must be at least one, all at least 1; got ()."),
        (lambda: bench({"a": torch.optim.SGD}, most=0), "bench: `most` must be at least 1; got 0."),
    ],
)
def test_a_mistake_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()
