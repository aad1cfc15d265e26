"""The compile check: `python -m sdnet.bench.compile_check`."""
