"""Placement by affinity: which experts should share a rank because the same tokens use them.

Two objectives, never mixed: `inter_layer_hops` (experts of consecutive layers; only where a token stays on the rank
of its last expert) and `token_fanout` (experts of one layer; where a token returns home after every layer).
Entry points: `moesim.solvers.affinity.plan.plan_affinity`, `solve.solve_hops`, `fanout.solve_fanout`.
"""
