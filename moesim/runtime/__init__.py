"""The live side: a model spread over ranks by a plan, a small serving loop, and the protocol that changes the plan.

`client` and `control` talk to a deployment and need no torch; `launch` starts one, with `coordinator`, `apply`, `deployment`
and `journal` in the launcher and `worker`, `agent`, `migration`, `expert_parallel`, `serving` and `capture` in the ranks.
"""
