"""Run a command and write down what it took; a process of its own, for a child counts its parent's memory as its peak.

python benchmark_child.py FILE COMMAND...   ends as the command does
"""

import json
import resource
import subprocess
import sys
import time

began = time.perf_counter()
status = subprocess.run(sys.argv[2:], check=False).returncode
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
with open(sys.argv[1], "w") as file:
    json.dump([seconds, used.ru_utime + used.ru_stime, peak / 2**30], file)
sys.exit(status)
