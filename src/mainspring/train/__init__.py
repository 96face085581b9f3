"""From text files to a trained checkpoint."""
