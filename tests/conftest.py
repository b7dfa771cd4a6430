"""One torch thread: small models are slower on two when the machine is busy, and subprocesses inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
