"""The fused path: A', A and all that surrounds them in three kernels. Start at `kernels`."""
