"""Files of a study in folders and in S3, and resuming from a checkpoint."""
