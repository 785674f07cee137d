r"""The chain game: the reason why superposition does not help, simulated exactly at a small size.

Door t has N keys, and j_t is the right one. A query point (i_1, ..., i_T) puts a key into each door, or none; what the
gradient of the chain shows there is which keys fit, and the right keys of the doors next to those that do. The oracle
adds the number of that answer to an answer register, in superposition over points. A hybrid run answers its k-th query
as if doors after k did not exist, so nothing in it depends on j_{k+1}, ..., and it differs from the true run only by
what happens to sit on points that the two oracles answer differently (projector Pi_k):

    |psi_K - phi_K| <= sum_k 2 |Pi_k phi_{k-1}|,      E_j |Pi_k phi_{k-1}|^2 <= (T - k + 1) / N

Fewer than T queries therefore succeed with probability near 1 / N at best, T of them with certainty, classical or
quantum. The simulation shows the mechanism; it does not prove the theorem, whose keys are directions in a space of high
dimension, and whose leak is exponentially small.

Reference:
    Garg, Kothari, Netrapalli, Sherif, No Quantum Speedup over Gradient Descent for Non-Smooth Convex Optimization,
    2020. https://arxiv.org/abs/2010.01801
    Zhang, Li, 2022. https://arxiv.org/abs/2212.03906
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Int
from torch import Tensor

from planish._support import bad
from planish.complexity.circuits import Circuit
from planish.complexity.instances import chain_grad

_KEY = 1.25  # size of a coordinate whose key fits: beyond 1, where the chain has nothing left to show
_LARGEST = 2**26  # amplitudes


@dataclass(frozen=True)
class HybridReport:
    """What true and hybrid runs did, over hidden chains.

    Attributes:
        distances: |psi_K - phi_K| of each chain.
        bounds: sum_k 2 |Pi_k phi_{k-1}| of each chain; never below its distance.
        leaks: Mean over chains of |Pi_k phi_{k-1}|^2, for k = 1, ..., K.
        leak_bounds: (T - k + 1) / N.
        hits: Mean over chains of the probability that the final point has all the right keys.
        hit_bound: (1 / sqrt(N) + sqrt(mean squared distance))^2, at most 1; for K < T.

    Example:
        >>> HybridReport((0.1, 0.3), (0.2, 0.2), (0.01,), (0.5,), 0.02, 0.9).violations
        1
    """

    distances: tuple[float, ...]
    bounds: tuple[float, ...]
    leaks: tuple[float, ...]
    leak_bounds: tuple[float, ...]
    hits: float
    hit_bound: float

    @property
    def violations(self) -> int:
        """Number of chains whose distance exceeds its bound by more than rounding: 0 if the lemma holds."""
        return sum(d > b + 1e-9 for d, b in zip(self.distances, self.bounds, strict=True))


class ChainGame:
    """Query algorithms on hidden chains, as state vectors over query points and answers.

    Args:
        n_keys: N, keys a door, >= 2.
        length: T, doors, >= 1.

    Raises:
        ValueError: An argument is out of range, or the state has more than 2^26 amplitudes.

    Attributes:
        points: All query points (i_1, ..., i_T), 0 for no key.
        n_answers: How many different answers there are.

    Example:
        >>> from planish.complexity.circuits import sequential_circuit
        >>> game = ChainGame(4, 3)
        >>> len(game.points), game.n_answers
        (125, 332)
        >>> game.success(game.run(sequential_circuit(game), (2, 4, 1)), (2, 4, 1))
        1.0
    """

    def __init__(self, n_keys: int, length: int) -> None:
        if n_keys < 2:
            raise bad("ChainGame", "n_keys", "at least 2", n_keys)
        if length < 1:
            raise bad("ChainGame", "length", "at least 1", length)
        n_points = (n_keys + 1) ** length
        if n_points > _LARGEST:
            raise bad("ChainGame", "n_keys, length", f"at most {_LARGEST} amplitudes together", f"{n_points} points")
        self.n_keys, self.length = n_keys, length
        self._shown = self._what_is_shown()
        kinds = self._kinds_of_answers()
        self.n_answers = sum(n_keys ** len(doors) for _, doors in kinds)
        if n_points * self.n_answers > _LARGEST:
            got = f"{n_points} points x {self.n_answers} answers"
            raise bad("ChainGame", "n_keys, length", f"at most {_LARGEST} amplitudes together", got)
        self._answers = self._number_answers(kinds)
        self.points: Int[Tensor, "points length"] = torch.tensor(
            list(itertools.product(range(n_keys + 1), repeat=length))
        )

    def _what_is_shown(self) -> dict[tuple[bool, ...], tuple[int, ...]]:
        """Return for every pattern of fitting keys the doors (from 0) whose entry of the true gradient is not zero."""
        patterns = list(itertools.product((False, True), repeat=self.length))
        grads = chain_grad(_KEY * torch.tensor(patterns, dtype=torch.float64))
        return {p: tuple(g.nonzero().flatten().tolist()) for p, g in zip(patterns, grads, strict=True)}

    def _kinds_of_answers(self) -> list[tuple[tuple[bool, ...], tuple[int, ...]]]:
        """Return the patterns that the true or a truncated oracle can see, with the doors shown there."""
        return sorted(
            {
                (self._cut(pattern, k), tuple(t for t in self._shown[self._cut(pattern, k)] if t < k))
                for pattern in self._shown
                for k in range(1, self.length + 1)
            }
        )

    def _number_answers(
        self, kinds: list[tuple[tuple[bool, ...], tuple[int, ...]]]
    ) -> dict[tuple[tuple[bool, ...], tuple[tuple[int, int], ...]], int]:
        """Number every (pattern, doors with their right keys)."""
        keys = range(1, self.n_keys + 1)
        every = (
            (pattern, tuple(zip(doors, right, strict=True)))
            for pattern, doors in kinds
            for right in itertools.product(keys, repeat=len(doors))
        )
        return {answer: number for number, answer in enumerate(every)}

    @staticmethod
    def _cut(pattern: tuple[bool, ...], known: int) -> tuple[bool, ...]:
        return tuple(fits and t < known for t, fits in enumerate(pattern))

    def _check(self, chain: Sequence[int]) -> tuple[int, ...]:
        made = tuple(int(j) for j in chain)
        if len(made) != self.length or not all(1 <= j <= self.n_keys for j in made):
            raise bad("ChainGame", "chain", f"{self.length} keys in [1, {self.n_keys}]", chain)
        return made

    def answers(self, chain: Sequence[int], known: int | None = None) -> Int[Tensor, " points"]:
        """Return the number of the answer at every point; with `known`, as if later doors did not exist.

        Args:
            chain: The right keys (j_1, ..., j_T), each in [1, N].
            known: Doors that exist, 1 to T; default all.

        Raises:
            ValueError: The chain does not fit the game.
        """
        chain, known = self._check(chain), self.length if known is None else known
        fits = self.points == torch.tensor(chain)
        numbers = {
            pattern: self._answers[(cut, tuple((t, chain[t]) for t in self._shown[cut] if t < known))]
            for pattern in self._shown
            for cut in [self._cut(pattern, known)]
        }
        weights = 2 ** torch.arange(self.length)
        table = torch.zeros(2**self.length, dtype=torch.int64)
        for pattern, number in numbers.items():
            table[int((torch.tensor(pattern) * weights).sum())] = number
        return table[(fits * weights).sum(-1)]

    def start(self) -> Complex[Tensor, "points answers"]:
        """Return the state of no keys and answer register 0."""
        state = torch.zeros(len(self.points), self.n_answers, dtype=torch.complex128)
        state[0, 0] = 1
        return state

    def query(self, state: Tensor, answers: Tensor, *, inverse: bool = False) -> Tensor:
        """Add the number of each point's answer to the answer register, modulo its size."""
        shift = -answers if inverse else answers
        source = (torch.arange(self.n_answers) - shift[:, None]) % self.n_answers
        return state.gather(1, source)

    def run(self, circuit: Circuit, chain: Sequence[int], *, hybrid: bool = False) -> Tensor:
        """Return the final state of a circuit; a hybrid run knows at its k-th query only k doors.

        Args:
            circuit: Unitaries with queries between them.
            chain: The right keys.
            hybrid: Whether the oracles are truncated; default False.
        """
        state = self.start()
        for k, (unitary, inverse) in enumerate(zip(circuit.unitaries, circuit.inverse, strict=True), 1):
            known = min(k, self.length) if hybrid else None
            state = self.query(unitary(state), self.answers(chain, known), inverse=inverse)
        return circuit.last(state)

    def success(self, state: Tensor, chain: Sequence[int]) -> float:
        """Return the probability that the points register holds all the right keys."""
        right = (self.points == torch.tensor(self._check(chain))).all(-1)
        return float(state[right].abs().square().sum())

    def hybrid_report(self, circuit: Circuit, chains: Sequence[Sequence[int]]) -> HybridReport:
        """Hold a circuit of fewer than T queries against the hybrid argument, on given hidden chains.

        Args:
            circuit: At most T queries.
            chains: Hidden chains; all of them, or a sample.

        Raises:
            ValueError: There is no chain, or the circuit has more than T queries.
        """
        if not chains:
            raise bad("ChainGame.hybrid_report", "chains", "at least one", chains)
        if len(circuit) > self.length:
            raise bad("ChainGame.hybrid_report", "circuit", f"one of at most {self.length} queries", len(circuit))
        distances, bounds, hits = [], [], []
        leaks = torch.zeros(len(circuit))
        for chain in chains:
            state, bound, whole = self.start(), 0.0, self.answers(chain)
            for k, (unitary, inverse) in enumerate(zip(circuit.unitaries, circuit.inverse, strict=True), 1):
                state, cut = unitary(state), self.answers(chain, k)
                leak = float(state[whole != cut].abs().square().sum())
                leaks[k - 1] += leak / len(chains)
                bound += 2 * math.sqrt(leak)
                state = self.query(state, cut, inverse=inverse)
            true = self.run(circuit, chain)
            distances.append(float((true - circuit.last(state)).norm()))
            bounds.append(bound)
            hits.append(self.success(true, chain))
        mean_square = sum(d * d for d in distances) / len(distances)
        hit_bound = 1.0 if len(circuit) >= self.length else min(1.0, (self.n_keys**-0.5 + math.sqrt(mean_square)) ** 2)
        leak_bounds = tuple((self.length - k) / self.n_keys for k in range(len(circuit)))
        return HybridReport(
            tuple(distances), tuple(bounds), tuple(leaks.tolist()), leak_bounds, sum(hits) / len(hits), hit_bound
        )

    def says_fits(self, door: int) -> Bool[Tensor, " answers"]:
        """Return for every answer whether it says that the key of a door (from 0) fits."""
        return torch.tensor([pattern[door] for pattern, _ in self._answers])
