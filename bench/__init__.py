"""Programs that measure: operators, training steps, loaders. `python -m sdnet.bench --help` lists them."""
