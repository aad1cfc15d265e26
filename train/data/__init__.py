"""Loaders: from pictures on disk to normalised batches on the device."""
