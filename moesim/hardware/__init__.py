"""Hardware documents: YAML in, `Cluster` out."""
