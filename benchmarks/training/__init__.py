"""What the training benchmarks share: shapes, contestants, timing."""
