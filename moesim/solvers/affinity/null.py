"""Nulls: the same loads without the affinity, so that a gain can be told from chance and from skewed loads.

`shuffle_layers` deals the choices of every layer to tokens at random: no relation between layers is left, all loads and
the company within a layer stay. `shuffle_choices` trades choices between tokens of one layer until no relation within
a layer is left; loads stay, and so does the rule that a token chooses an expert once. Both are seeded.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.affinity.routes import TokenRoutes


def shuffle_layers(routes: TokenRoutes, *, seed: int = 0) -> TokenRoutes:
    """Return the tokens with the rows of every layer shuffled independently."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1])))
    experts = np.empty_like(routes.experts_TLK)
    valid = None if routes.valid_TLK is None else np.empty_like(routes.valid_TLK)
    for layer in range(routes.num_layers):
        order = generator.permutation(len(routes))
        experts[:, layer] = routes.experts_TLK[order, layer]
        if valid is not None and routes.valid_TLK is not None:
            valid[:, layer] = routes.valid_TLK[order, layer]
    return routes.with_experts(experts, valid)


def shuffle_choices(routes: TokenRoutes, *, seed: int = 0, rounds: int = 6) -> TokenRoutes:
    """Return the tokens after random trades of one choice between random pairs of tokens, `rounds` per choice and layer.

    A trade that would give a token an expert twice does not happen, and neither does one with a choice that does not exist.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 2])))
    experts = routes.experts_TLK.copy()
    tokens, layers, width = experts.shape
    half = tokens // 2
    for layer in range(layers):
        row_TK = experts[:, layer]
        valid_TK = None if routes.valid_TLK is None else routes.valid_TLK[:, layer]
        for _ in range(rounds * width):
            order = generator.permutation(tokens)
            one, other = order[:half], order[half : 2 * half]
            mine, theirs = generator.integers(0, width, half), generator.integers(0, width, half)
            give, take = row_TK[one, mine], row_TK[other, theirs]
            barred = (row_TK[other] == give[:, None]).any(axis=1) | (row_TK[one] == take[:, None]).any(axis=1)
            if valid_TK is not None:
                barred |= ~valid_TK[one, mine] | ~valid_TK[other, theirs]
            go = ~barred
            row_TK[one[go], mine[go]] = take[go]
            row_TK[other[go], theirs[go]] = give[go]
    return routes.with_experts(experts, routes.valid_TLK)
