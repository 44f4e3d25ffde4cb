"""What the three domains share. Waiting threads are told to sleep here, before the first import of torch reads it."""

import os

# OpenMP's threads spin while they wait for each other. Beside another busy process that made steps ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
