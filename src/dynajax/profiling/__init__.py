"""Cost of training: operations, memory, kernels and times."""
