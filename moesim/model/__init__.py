"""Model documents: Hugging Face `config.json` in, `MoEModel` out."""
