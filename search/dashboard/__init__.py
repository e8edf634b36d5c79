"""Notes, files and graphs for optuna-dashboard, and its server."""
