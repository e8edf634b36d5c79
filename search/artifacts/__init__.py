"""Files of a study in folders and in S3, and resuming a training from its checkpoint."""
