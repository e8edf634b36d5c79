"""How workers are started: on this machine, on shared GPUs, on a Ray cluster."""
