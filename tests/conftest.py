"""For every test: one torch thread, and Ctrl-C that works.

Small models are slower on two threads when the machine is busy; subprocesses inherit the setting. A shell starts
background jobs with SIGINT ignored, and Python keeps it so: the interrupt tests, and the programs they start, need it.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
