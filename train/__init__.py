"""Training programs: recipes, the trainer, its loaders and its run folder."""
