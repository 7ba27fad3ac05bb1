"""Request traces: who asks when for how many tokens, and which prefix they share."""
