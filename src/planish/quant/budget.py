"""What widths cost (average bits, bytes, bit operations), and how learned widths become whole ones within a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish._support import bad
from planish.quant.formats import Affine
from planish.quant.mixed import allocate
from planish.quant.noise import LEAST, MOST, Width

FLOAT_BITS = 32
"""Width of what is not quantized, in bit operations."""


@dataclass
class Part:
    """One layer, as a budget sees it.

    Attributes:
        weight: Width of its weight.
        inputs: Width of its input; None where that stays in float.
        n_weights: Values of the weight.
        n_inputs: Values of the input for one example.
        products: Multiplications for one example.
        overhead: Bits that its scales take.
    """

    weight: Width
    inputs: Width | None
    n_weights: int
    n_inputs: int
    products: int
    overhead: int


@dataclass(frozen=True)
class Goal:
    """A target for one kind of cost.

    Attributes:
        kind: "bits" (average over weights), "act_bits" (average over inputs), "bytes" or "bops".
        target: The cost to be met.
    """

    kind: str
    target: float


class Budget:
    """The costs of a model's layers as functions of their widths, and the targets for them.

    Args:
        parts: The layers by name.
        goals: The targets; none where widths are not learned.
        grid: Grid of the weights but for its bits.
        rate: How fast multipliers follow the gap, a step; default 0.02.
        stiffness: Weight of the squared gap; default 1.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        goals: Sequence[Goal],
        grid: Affine,
        *,
        rate: float = 0.02,
        stiffness: float = 1.0,
    ) -> None:
        self.parts, self.goals, self.grid = dict(parts), list(goals), grid
        self.rate, self.stiffness = rate, stiffness

    def spent(self, goal: Goal, width_of: Callable[[Width], Tensor] = lambda width: width.value) -> Tensor:
        """Return one cost, a scalar with the gradient of the widths: what is expected under the noise on them."""
        total: Tensor = torch.zeros(())
        parts = self.parts.values()
        if goal.kind == "bits":
            n = sum(part.n_weights for part in parts)
            return sum((width_of(p.weight) * (p.n_weights / n) for p in parts), total)
        if goal.kind == "act_bits":
            rounded = [(p.inputs, p.n_inputs) for p in parts if p.inputs is not None]
            n = sum(count for _, count in rounded)
            return sum((width_of(width) * (count / n) for width, count in rounded), total)
        if goal.kind == "bytes":
            return sum(((width_of(p.weight) * p.n_weights + p.overhead) / 8 for p in parts), total)
        bits = [(p, FLOAT_BITS if p.inputs is None else width_of(p.inputs)) for p in parts]
        return sum((width_of(p.weight) * act * p.products for p, act in bits), total)

    def penalty(self, multiplier: Tensor, *, climb: bool) -> Tensor:
        """Return the sum over goals of multiplier * gap + stiffness / 2 * gap^2, the gaps relative to the targets.

        Args:
            multiplier: One a goal.
            climb: Then raise every multiplier with its gap, in place (dual ascent): the pressure grows until the
                target is met. It is never below 0.
        """
        total = multiplier.new_zeros(())
        for number, goal in enumerate(self.goals):
            gap = self.spent(goal).to(total.device) / goal.target - 1
            total = total + multiplier[number].clone() * gap + self.stiffness / 2 * gap.square()
            if climb:
                multiplier[number] = (multiplier[number] + self.rate * gap.detach()).clamp(min=0)
        return total

    def start(self, goals: Sequence[Goal], act_bits: float | int | None) -> None:
        """Let every width start where the budget is met by one width for all.

        Raises:
            ValueError: No width meets it.
        """
        edge = 0.02  # a learned width cannot start at the very end of its range

        def begin(chosen: Iterable[Width | None], bits: float | int) -> None:
            for width in chosen:
                if width is not None:
                    width.start(min(max(bits, LEAST + edge), MOST - edge) if width.raw is not None else bits)

        parts = self.parts.values()
        if act_bits is not None:
            begin((p.inputs for p in parts), act_bits)
        begin((p.weight for p in parts), self.uniform(goals[0]) if self.goals else goals[0].target)

    def uniform(self, goal: Goal) -> float:
        """Return the one width for all that meets a goal, to start from.

        Raises:
            ValueError: No width does.
        """
        entering = {id(part.inputs) for part in self.parts.values()}

        def at(bits: float) -> float:  # inputs stay where they begin
            return float(self.spent(goal, lambda w: w.value.detach() if id(w) in entering else _exact(bits)))

        low, high = float(LEAST), float(MOST)
        if not at(low) <= goal.target <= at(high):
            name = {"bytes": "size"}.get(goal.kind, goal.kind)
            raise bad("attach", name, f"from {at(low):g} ({LEAST} bits) to {at(high):g} ({MOST} bits)", goal.target)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) < goal.target else (low, middle)
        return (low + high) / 2

    @torch.no_grad()
    def settle(self, menu: Sequence[int]) -> None:
        """Fix every learned width at a whole one, within the budgets.

        Where training has come to rest, a further bit is worth the same everywhere, relative to its price; the learned
        width thus tells how sensitive a layer is, and the whole widths are the best ones for these sensitivities.

        Raises:
            ValueError: The least widths of the menu exceed a target.
        """
        for goal in self.goals:
            widths = self._widths(goal)
            if not any(width.learning for width in widths):
                continue
            values = {id(w): _exact(w.value.item()) for w in widths}
            with torch.enable_grad():
                leaves = [values[id(w)].requires_grad_() for w in widths]
                amounts = [
                    float(a)
                    for a in torch.autograd.grad(self.spent(goal, lambda w, v=values: v[id(w)]), leaves)  # type: ignore[misc]
                ]
            sensitivity = [a * 4.0 ** v.item() for a, v in zip(amounts, leaves, strict=True)]
            least = float(self.spent(goal, lambda _: _exact(min(menu))))
            if least > goal.target * (1 + 1e-6):
                raise bad("freeze", "widths", f"widths whose least costs at most {goal.target:g}", tuple(menu))
            if goal.kind == "bops":  # the price of a bit of the weight depends on the input's
                place = {id(width): i for i, width in enumerate(widths)}
                terms = [(p.products, place[id(p.weight)], place.get(id(p.inputs))) for p in self.parts.values()]

                def cost(bits: Sequence[int], terms: list[tuple[int, int, int | None]] = terms) -> float:
                    return sum(float(n * bits[w] * (FLOAT_BITS if a is None else bits[a])) for n, w, a in terms)

                found = allocate(sensitivity, amounts, goal.target, menu, cost=cost)
            else:
                fixed = least - sum(amounts) * min(menu)
                found = allocate(sensitivity, amounts, goal.target - fixed, menu)
            for width, bits in zip(widths, found, strict=True):
                width.fix(bits)

    def _widths(self, goal: Goal) -> list[Width]:
        """Return the widths that a goal is about, each once."""
        found: dict[int, Width] = {}
        for part in self.parts.values():
            concerned = [part.inputs] if goal.kind == "act_bits" else [part.weight]
            concerned += [part.inputs] if goal.kind == "bops" else []
            found |= {id(w): w for w in concerned if w is not None}
        return list(found.values())


def _exact(bits: float | int) -> Tensor:
    return torch.tensor(float(bits), dtype=torch.float64)


def read_goals(
    bits: float | int | None,
    size: float | int | None,
    bops: float | int | None,
    act_bits: float | int | None,
    *,
    learn: bool,
) -> list[Goal]:
    """Read the budget: one goal for the weights, one for the inputs where they have their own."""
    asked = {"bits": bits, "bytes": size, "bops": bops}
    given = [Goal(kind, float(value)) for kind, value in asked.items() if value is not None]
    if len(given) > 1:
        raise bad("attach", "bits", "the only budget given: bits, size or bops", [goal.kind for goal in given])
    goals = given or [Goal("bits", 4.0)]
    if not learn and goals[0].kind != "bits":
        raise bad("attach", "learn", "True with `size` or `bops`", learn)
    if act_bits is not None and goals[0].kind != "bops":
        goals.append(Goal("act_bits", float(act_bits)))
    for goal in goals:
        if goal.kind in ("bits", "act_bits") and not LEAST <= goal.target <= MOST:
            raise bad("attach", goal.kind, f"from {LEAST} to {MOST}", goal.target)
    return goals
