"""What faults, many workers and long studies cost."""
