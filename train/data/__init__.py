"""Data loading: from images on disk to normalised batches on the device."""
