"""Results of stages by content address, so that strategies that share stages share their work."""
