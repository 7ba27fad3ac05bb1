"""The live side: a model spread over ranks by a plan, a small serving loop, and the protocol that changes the plan.

`client` and `control` talk to a deployment and need no torch; `launch` starts one (`templates` elsewhere), with `coordinator`,
`apply`, `deployment` and `journal` in the launcher and `worker`, `agent`, `migration`, `serving` and `capture` in the ranks. A rank's
part of the model is `mesh`, `model`, `expert_parallel`, `tensor_parallel` and `pipeline`; `checkpoint` and `training` work on parts.
"""
