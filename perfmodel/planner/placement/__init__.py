"""Where things go: cache segments, experts, layers, offloaded tensors and adapters, one formulation a file."""
