"""Serving: requests in, continuous batching on instances of a deployment, times of every request out."""
