"""One public function per operation, each with its PyTorch reference and its backends."""
