"""Published throughput of MoE deployments: its setting as data, and what an ordinary replay of that setting predicts."""
