"""Measuring OpenAI-compatible servers: how fast they are, and how far their log-probabilities are from ours."""
