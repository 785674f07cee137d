"""How do optimizers fare on the worst function there is? A table, a picture, and the bound that nobody passes."""

import torch

from planish.complexity import bench, query_lower_bound

optimizers = {
    "gradient descent": lambda p: torch.optim.SGD(p, lr=1 / 20),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=1 / 50, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "L-BFGS": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
}
scores = bench(optimizers, lengths=(5, 10, 20, 40))
print(scores)
scores.plot().figure.savefig("worst_case.svg")
print("picture: worst_case.svg")
for eps in (1e-3, 1e-4):
    bound = query_lower_bound(eps, model="quantum")
    print(f"gradient norm {eps:g}: at least {bound.queries} queries, quantum speed-up: {bound.speed_up}")
