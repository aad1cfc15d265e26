"""Qualification: which kernels are right and quicker on this machine, measured before they are used."""
