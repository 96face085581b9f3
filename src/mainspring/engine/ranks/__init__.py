"""One model over several processes: the engine's steps run on all ranks of a layout, led by rank 0."""
