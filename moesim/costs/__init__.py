"""Operator and collective times with their provenance: `CostModel(cluster, model)`."""

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.model import CostModel
from moesim.costs.provenance import Provenance, Timing
from moesim.costs.traffic import ALGORITHMS

__all__ = ["ALGORITHMS", "CostModel", "ExchangeTiming", "Provenance", "Timing"]
