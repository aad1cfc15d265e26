"""Programs that learn: recipes, the trainer, its loaders and its run folder."""
