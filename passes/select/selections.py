"""Every selection's score, float64 and higher for what matters more. `config.SELECTIONS` says what each one needs.

nothing       (seed, key, units) -> a number for each unit
weight        (weight, dim) -> one for each position along dim
activations   (use, unit) -> of a use of the weight in a product, one for each value of the labels in `unit`
gradients     (gradient of a batch, dim) -> one for each position along dim
"""

from collections.abc import Callable

from .products import activation, weighted_activation
from .scores import low_rank_squares, random_scores, squares

SCORES: dict[str, Callable] = {
    "random": random_scores,
    "weight": squares,
    "lowrank": low_rank_squares,
    "activation": activation,
    "weight_activation": weighted_activation,
    "gradient": squares,
}
