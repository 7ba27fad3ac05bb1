"""moesim: a discrete-event simulator and planner for Mixture-of-Experts models."""

__version__ = "0.1.0"
