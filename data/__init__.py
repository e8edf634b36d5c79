"""Where images come from, how they are divided, and how batches are made on the device."""
