"""Compiled code for the CPU."""
