"""Everything about studies: space, storage, trials, workers, the finale and the command line."""
