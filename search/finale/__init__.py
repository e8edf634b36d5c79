"""Confirm, retrain, convergence and comparison."""
