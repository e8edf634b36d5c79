"""What samplers, pruners and parallel workers gain, replayed and real."""
