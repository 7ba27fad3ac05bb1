"""Hardware documents: YAML in, `Cluster` out; measured tables beside them."""

from moesim.hardware.cluster import Cluster, Device, Link, SizeCurve, Tier
from moesim.hardware.load import library_names, load_cluster

__all__ = ["Cluster", "Device", "Link", "SizeCurve", "Tier", "library_names", "load_cluster"]
