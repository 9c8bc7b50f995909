"""The facts that scores and allocations need beside the weights: one table for all frameworks."""

from __future__ import annotations

FACTS = {
    "gradient": "dL/dw, mean over batches; the weight's shape",
    "squared_gradient": "(dL/dw)^2, mean over batches (of one example each: the Fisher diagonal); the weight's shape",
    "hessian_gradient": "the Hessian of the loss times its gradient; the weight's shape",
    "flow": "dR/d|w| for R the sum of outputs for an input of ones, with |weights|; the weight's shape",
    "moved": "the sum over steps of -(learning rate) w dL/dw; the weight's shape",
    "input_norm": "the L2 norm over samples and positions of the input that the weight multiplies; the weight's shape",
    "noise": "uniform random numbers in (0, 1]; the weight's shape",
    "zeros": "the share of zeros among a unit's outputs; one per unit",
    "output": "the mean magnitude of a unit's outputs; one per unit",
    "deviation": "the standard deviation of a unit's outputs; one per unit",
    "gate": "the scale by which a normalisation multiplies a unit's output; one per unit",
}
"""What a score may need, by name."""


PER_UNIT = frozenset({"zeros", "output", "deviation", "gate"})
"""Facts that speak of units; the others speak of weights."""
