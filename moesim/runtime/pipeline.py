"""One pipeline stage of a Hugging Face model: its layers, what comes from the stage before, what goes to the next.

Every rank of a stage passes the hidden states of its tokens on to the rank with the same place in the next stage; the last stage
picks the next tokens and tells them to all. A step is one batch through all stages in turn, without micro-batches, so that
the rows of every matrix product are those of a deployment without stages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesim.runtime.mesh import Mesh


def cut(model: nn.Module, layers: range) -> None:
    """Keep only `layers` of a skeleton, with the embedding in the first stage and the head in the last."""
    base: Any = model.model
    total = len(base.layers)
    if layers == range(total):
        return
    config = model.config
    base.layers = nn.ModuleList(list(base.layers)[layers.start : layers.stop])
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[layers.start : layers.stop]
    for index, layer in enumerate(base.layers):
        for module in layer.modules():  # the cache of a stage counts its own layers
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    if layers.start:
        base.embed_tokens = None
    if layers.stop < total:
        base.norm, model.lm_head = nn.Identity(), None


class Stage:
    """Runs this rank's stage on the tokens that its replica serves."""

    def __init__(self, model: Any, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh

    def __call__(self, tokens_BN: torch.Tensor, *, cache: Any = None, use_cache: bool = False, keep: int = 0) -> tuple[torch.Tensor, Any]:
        """Return (output, cache); the output is the logits of the last `keep` positions (0: all) in the last stage, else hidden states."""
        mesh, options = self.mesh, {"past_key_values": cache, "use_cache": use_cache}
        if mesh.stage:
            hidden = torch.empty((*tokens_BN.shape, self.model.config.hidden_size), dtype=self.model.dtype)
            mesh.pp.recv([hidden], mesh.stage - 1, 0).wait()
            options["inputs_embeds"] = hidden
        else:
            options["input_ids"] = tokens_BN
        if mesh.is_last:
            output = self.model(**options, logits_to_keep=keep)
            return output.logits, output.past_key_values
        output = self.model.model(**options)
        hidden = output.last_hidden_state.contiguous()
        mesh.pp.send([hidden], mesh.stage + 1, 0).wait()
        return hidden, output.past_key_values

    def next_tokens(self, tokens_BN: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Return the most likely next token of every request [B, 1], on all stages, and the cache."""
        output, cache = self(tokens_BN, cache=cache, use_cache=True, keep=1)
        if self.mesh.is_last:
            chosen = output[:, -1].argmax(-1, keepdim=True)
        else:
            chosen = torch.empty((tokens_BN.shape[0], 1), dtype=torch.int64)
        if self.mesh.pp is not None:
            self.mesh.pp.broadcast(chosen, self.mesh.layout.pp - 1).wait()
        return chosen, cache

    def collect(self, rows_LN: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return in the first stage the leading rows of all stages one after another (`counts`: how many each has), elsewhere none."""
        if self.mesh.pp is None:
            return rows_LN
        first = self.mesh.stage == 0
        receive = counts if first else [0] * len(counts)
        result = rows_LN.new_empty((sum(receive), *rows_LN.shape[1:]))
        self.mesh.pp.alltoall_base(result, rows_LN.contiguous(), receive, [rows_LN.shape[0], *[0] * (len(counts) - 1)]).wait()
        return result
