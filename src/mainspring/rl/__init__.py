"""Post-training: the mathematics as pure functions, and one file per algorithm whose loop can be read."""
