"""What the drivers share: which linears are targets, and what counts as changed."""

import mmap

import pytest
import torch

from benchmarks import driver


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_targets_are_all_linears_but_the_head():
    assert list(driver.targets(Net())) == ["body"]


def test_changed_returns_only_what_moved():
    before = driver.float_parameters(Net())
    after = {name: p.clone() for name, p in before.items()}
    assert driver.changed(before, after) == {}
    after["body.weight"][0, 0] += 1
    assert list(driver.changed(before, after)) == ["body.weight"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda after: after.pop("body.bias"), "no parameter `body.bias`"),
        (lambda after: after.update({"body.bias": torch.zeros(3)}), "has shape"),
        (lambda after: after["body.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_changed_refuses_weights_that_cannot_be_scored(spoil, sentence):
    before = driver.float_parameters(Net())
    after = {name: p.clone() for name, p in before.items()}
    spoil(after)
    with pytest.raises(ValueError, match=sentence):
        driver.changed(before, after)


def test_the_peak_sees_memory_that_came_and_went():
    if not driver.resident_bytes():
        pytest.skip("this system does not tell a process its resident size")
    with driver._ResidentPeak(period=0.001) as memory:
        with mmap.mmap(-1, 64 * 2**20) as block:  # not from the allocator, which may have freed memory at hand
            block.write(b"x" * len(block))
    assert memory.peak - memory.start > 32 * 2**20
