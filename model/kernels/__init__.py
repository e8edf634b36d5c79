"""Compiled code for the CPU; `model.kernels.dispatch` is its entry point."""
