"""Model documents: Hugging Face `config.json` in, `MoEModel` out; bytes and FLOPs of every operator."""

from moesim.model.hf_config import library_names, load_model
from moesim.model.moe_model import DTYPE_BYTES, Attention, MoEModel

__all__ = ["DTYPE_BYTES", "Attention", "MoEModel", "library_names", "load_model"]
