"""Arguments of the losses that are refused, by their sentence."""

import pytest
import torch

from planish.regression import NonCrossingPenalty, noncrossing_penalty, pinball_loss


def test_pairs_of_everyone_with_everyone_are_refused():
    column, row = torch.zeros(5, 1), torch.zeros(5)
    with pytest.raises(ValueError, match=r"^pinball_loss: `target` must be of the shape of `prediction`, \(5, 1\)"):
        pinball_loss(column, row, 0.5)
    with pytest.raises(
        ValueError, match=r"^pinball_loss: `level` must be a float or of a shape that broadcasts to \(5,"
    ):
        pinball_loss(column, column, row)
    with pytest.raises(ValueError, match="`level` must be a float or of a shape"):
        pinball_loss(row, row, torch.full((2, 5), 0.5))
    assert pinball_loss(torch.zeros(5, 3), torch.ones(5, 3), torch.tensor([0.1, 0.5, 0.9])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("level", [0.0, 1.0, float("nan")])
def test_levels_outside_are_refused(level):
    with pytest.raises(ValueError, match=r"^pinball_loss: `level` must be in \(0, 1\)"):
        pinball_loss(torch.zeros(2), torch.zeros(2), level)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="^pinball_loss: `reduction` must be 'mean', 'sum' or 'none'; got 'max'.$"):
        pinball_loss(torch.zeros(2), torch.zeros(2), 0.5, reduction="max")
    with pytest.raises(
        ValueError, match="^noncrossing_penalty: `net` must be a network of one value a level, 3; got 6.$"
    ):
        noncrossing_penalty(lambda x, t: torch.cat([t, t]), torch.zeros(3, 1), torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="^NonCrossingPenalty: `weight` must be a float >= 0; got -1.0.$"):
        NonCrossingPenalty(-1.0)
