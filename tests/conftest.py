"""What every test package shares."""

import os

# Tests run networks too small for two threads, often beside other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
