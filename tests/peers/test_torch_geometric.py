"""Our Chebyshev convolution is PyTorch Geometric's, with its weights."""

import pytest
import torch

from planish.graphs import ChebCascadeConv, knn_graph, to_edges

pyg = pytest.importorskip("torch_geometric.nn", exc_type=ImportError)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_chebconv(order):
    generator = torch.Generator().manual_seed(0)
    w = knn_graph(torch.rand(12, 2, generator=generator), 3)
    w[5] = w[:, 5] = 0  # nobody's neighbour
    index, weight = to_edges(w)
    x = torch.randn(12, 4, generator=generator)
    theirs = pyg.ChebConv(4, 3, order)
    ours = ChebCascadeConv(4, 3, order, cascade=False)
    with torch.no_grad():
        theirs.bias.normal_()
        ours.biases[0] = theirs.bias
        for k, linear in enumerate(theirs.lins):
            ours.weights[0][k] = linear.weight.T
    assert torch.allclose(ours(x, index, weight), theirs(x, index, weight), atol=1e-5)
    assert torch.allclose(ours(x, w), ours(x, index, weight), atol=1e-6)
