"""How hard is it? Functions on which every method is slow, oracles that count, bounds that nobody passes.

How to choose: `query_lower_bound` says how many queries a gradient of norm eps costs at least; `ZeroChain` is the
function that proves it and a test for optimizers, which `bench` runs; `CountingOracle` and `StochasticOracle` count the
queries of a program of your own. `ChainGame` simulates quantum queries and checks why they do not help.
"""

from planish.complexity.circuits import Circuit, grover_circuit, random_circuit, sequential_circuit
from planish.complexity.instances import SMOOTHNESS, ZeroChain
from planish.complexity.oracles import CountingOracle, StochasticOracle, geometric_queries
from planish.complexity.quantum import ChainGame, HybridReport
from planish.complexity.rates import QueryLowerBound, query_lower_bound
from planish.complexity.scores import Score, Scores, bench

__all__ = [
    "SMOOTHNESS",
    "ChainGame",
    "Circuit",
    "CountingOracle",
    "HybridReport",
    "QueryLowerBound",
    "Score",
    "Scores",
    "StochasticOracle",
    "ZeroChain",
    "bench",
    "geometric_queries",
    "grover_circuit",
    "query_lower_bound",
    "random_circuit",
    "sequential_circuit",
]
