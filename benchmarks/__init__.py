"""Scripts that measure, each with its dated results in ``results/``."""
