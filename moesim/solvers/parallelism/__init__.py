"""How to split a model over a machine: tensor, expert, data and pipeline degrees, redundancy, batches and pools, searched completely."""
