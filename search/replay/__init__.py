"""Searches replayed on measured learning curves: seconds in place of days."""
