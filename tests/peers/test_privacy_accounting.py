"""Our accounts beside Opacus' and dp-accounting's."""

import pytest

from planish.optim import calibrate_noise, privacy_spent

CASES = [(1.0, 1e-5, 50, 1.0), (1.0, 1e-5, 500, 0.02), (4.0, 1e-5, 60, 0.1)]


@pytest.mark.parametrize(("epsilon", "delta", "steps", "rate"), CASES)
def test_opacus(epsilon, delta, steps, rate):
    pytest.importorskip("opacus")
    ours = calibrate_noise(epsilon, delta, steps, rate)
    prv = calibrate_noise(epsilon, delta, steps, rate, accountant="prv")
    rdp = calibrate_noise(epsilon, delta, steps, rate, accountant="rdp")
    assert ours <= prv * (1 + 1e-3) and prv == pytest.approx(ours, rel=0.03)
    assert prv < rdp < 1.2 * ours


@pytest.mark.parametrize("adjacency", ["add_remove", "replace"])
@pytest.mark.parametrize(("epsilon", "delta", "steps", "rate"), CASES)
def test_dp_accounting(epsilon, delta, steps, rate, adjacency):
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import pld_privacy_accountant

    relation = dp_accounting.NeighboringRelation
    if adjacency == "replace" and rate < 1:
        pytest.skip("it has no replacement of one record under Poisson sampling")
    z = calibrate_noise(epsilon, delta, steps, rate, adjacency=adjacency)
    step = dp_accounting.GaussianDpEvent(z if adjacency == "add_remove" else z / 2)
    event = dp_accounting.PoissonSampledDpEvent(rate, step) if rate < 1 else step
    theirs = pld_privacy_accountant.PLDAccountant(relation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-3)
    theirs.compose(dp_accounting.SelfComposedDpEvent(event, steps))
    assert theirs.get_epsilon(delta) == pytest.approx(epsilon, rel=0.01)
    assert theirs.get_epsilon(delta) == pytest.approx(
        privacy_spent([(z, rate, steps)], delta, adjacency=adjacency), rel=0.01
    )
