"""Robustness measured: accuracy over lambda and severity, rules for lambda, and adversaries."""
