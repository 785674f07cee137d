"""Layers: activations that are smooth where ReLU has a corner.

How to choose: `ReQU` where derivatives of the network enter the loss and the network is shallow.
"""

from planish.nn.requ import ReQU, requ

__all__ = ["ReQU", "requ"]
