"""Circuits for the chain game: sequential, Grover's, and random ones.

A circuit is a list of unitary maps of a state (points, answers) with a query after each, and a last map.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from planish._support import bad

if TYPE_CHECKING:
    from planish.complexity.quantum import ChainGame

Unitary = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Circuit:
    """Unitaries with a query after each, and a last one.

    Args:
        unitaries: Linear maps of states that keep their norm.
        last: What follows the last query.
        inverse: Which queries run the oracle backwards; default none.

    Example:
        >>> len(Circuit((lambda state: state,), lambda state: state))
        1
    """

    unitaries: tuple[Unitary, ...]
    last: Unitary
    inverse: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the directions of the queries."""
        if not self.inverse:
            object.__setattr__(self, "inverse", (False,) * len(self.unitaries))
        if len(self.inverse) != len(self.unitaries):
            raise bad("Circuit", "inverse", f"one flag a query, {len(self.unitaries)}", self.inverse)

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.unitaries)


def sequential_circuit(game: "ChainGame") -> Circuit:
    """Return the circuit of T queries that reads one key after another and is right with certainty.

    Args:
        game: The game.

    Example:
        >>> from planish.complexity import ChainGame
        >>> len(sequential_circuit(ChainGame(4, 3)))
        3
    """
    steps: list[Unitary] = [_same, *(_write(game, door) for door in range(game.length))]
    return Circuit(tuple(steps[:-1]), steps[-1])


def grover_circuit(game: "ChainGame", iterations: int) -> Circuit:
    """Return the circuit that searches each door's key by Grover's algorithm, deaf to what gradients show.

    Each iteration asks twice (the oracle and its inverse) whether a key fits; the amplitude of the right key of a door
    becomes sin((2 iterations + 1) arcsin(1 / sqrt(N))).

    Args:
        game: The game.
        iterations: Of each door, >= 0.

    Raises:
        ValueError: `iterations` is negative.

    Example:
        >>> from planish.complexity import ChainGame
        >>> len(grover_circuit(ChainGame(4, 3), 1))
        6
    """
    if iterations < 0:
        raise bad("grover_circuit", "iterations", "at least 0", iterations)
    unitaries: list[Unitary] = []
    inverse: list[bool] = []
    pending: Unitary = _same
    for door in range(game.length):
        pending = _then(pending, _on_door(game, door, _spread(game.n_keys)))
        for _ in range(iterations):
            unitaries += [pending, _mark(game, door)]
            inverse += [False, True]
            pending = _on_door(game, door, _reflect(game.n_keys))
    return Circuit(tuple(unitaries), pending, tuple(inverse))


def random_circuit(game: "ChainGame", n_queries: int, generator: torch.Generator) -> Circuit:
    """Return a circuit with Haar-random unitaries on both registers and random phases between queries.

    Args:
        game: The game.
        n_queries: K, >= 0.
        generator: Draws them.

    Raises:
        ValueError: `n_queries` is negative.

    Example:
        >>> from planish.complexity import ChainGame
        >>> len(random_circuit(ChainGame(2, 2), 1, torch.Generator().manual_seed(0)))
        1
    """
    if n_queries < 0:
        raise bad("random_circuit", "n_queries", "at least 0", n_queries)
    steps = []
    for _ in range(n_queries + 1):
        left, right = _haar(len(game.points), generator), _haar(game.n_answers, generator)
        shape = (len(game.points), game.n_answers)
        angle = 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)
        steps.append(_mix(left, right, torch.polar(torch.ones_like(angle), angle)))
    return Circuit(tuple(steps[:-1]), steps[-1])


def _mix(left: Tensor, right: Tensor, phase: Tensor) -> Unitary:
    return lambda state: phase * (left @ state @ right)


def _write(game: "ChainGame", door: int) -> Unitary:
    """After a query with the keys before `door` in place: put in the key that it showed there, clear the register.

    It swaps each such pair (point, answer) with (point and key, 0) and leaves all else, so it is a permutation.
    """
    target = torch.arange(len(game.points) * game.n_answers)
    size = game.n_keys + 1
    places = [size ** (game.length - 1 - t) for t in range(game.length)]
    for keys in itertools.product(range(1, size), repeat=door + 1):
        answers = game.answers((*keys, *(1,) * (game.length - door - 1)))
        point = sum(j * place for j, place in zip(keys[:door], places, strict=False))
        a = point * game.n_answers + int(answers[point])
        b = (point + keys[door] * places[door]) * game.n_answers
        target[a], target[b] = b, a
    return lambda state: state.flatten()[target].reshape(state.shape)  # its own inverse


def _on_door(game: "ChainGame", door: int, matrix: Tensor) -> Unitary:
    size = game.n_keys + 1
    shape = (size**door, size, size ** (game.length - 1 - door) * game.n_answers)
    return lambda state: torch.einsum("ij,ajb->aib", matrix, state.reshape(shape)).reshape(state.shape)


def _uniform(n_keys: int) -> Tensor:
    uniform = torch.full((n_keys + 1,), n_keys**-0.5, dtype=torch.complex128)
    uniform[0] = 0
    return uniform


def _spread(n_keys: int) -> Tensor:
    """Take "no key" to equal amplitudes of all keys: a Householder reflection."""
    v = -_uniform(n_keys)
    v[0] += 1
    return torch.eye(n_keys + 1, dtype=torch.complex128) - torch.outer(v, v)


def _reflect(n_keys: int) -> Tensor:
    """Reflect about equal amplitudes."""
    uniform = _uniform(n_keys)
    return 2 * torch.outer(uniform, uniform) - torch.eye(n_keys + 1, dtype=torch.complex128)


def _mark(game: "ChainGame", door: int) -> Unitary:
    """Turn the sign where the answer says that the key of a door fits."""
    sign = torch.where(game.says_fits(door), -1.0, 1.0).to(torch.complex128)
    return lambda state: state * sign


def _same(state: Tensor) -> Tensor:
    return state


def _then(first: Unitary, second: Unitary) -> Unitary:
    return lambda state: second(first(state))


def _haar(size: int, generator: torch.Generator) -> Tensor:
    made = torch.randn(size, size, dtype=torch.complex128, generator=generator)
    q, r = torch.linalg.qr(made)
    d = r.diagonal()
    return torch.mul(q, d / d.abs())
