"""The gradient of the dictionary, in one deterministic reduction. Start at `weight_gradient`."""
