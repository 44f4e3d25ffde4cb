"""Programs that models write: found in a completion, put together with their tests, run in a process of their own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SECONDS = 10
WAITING = 4  # times as long on the clock as on the processor, which others use too: what is right does not hang on them
MEMORY_BYTES = 4 * 2**30
FILE_BYTES = 16 * 2**20
PASSED = 73  # exit status of a program that ran to its end; sys.exit(0) before the tests is none
# The limits are set within the child before it reads the program, so no fork of this process runs Python code.
BOOTSTRAP = """
import os, resource, runpy, sys
path, seconds, memory, file, passed = sys.argv[1], *map(int, sys.argv[2:])
for kind, limit in {"CPU": seconds, "AS": memory, "FSIZE": file, "CORE": 0}.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
runpy.run_path(path, run_name="program")
os._exit(passed)
"""
BEHIND = ("The solution is:", "The answer is:")  # habits of the code expert: the program follows
EXAMPLES = ('if __name__ == "__main__":', "# Example usage", "# Test examples")


def program_in(completion: str) -> str:
    """The program of a completion: what its first ```python fence encloses, else all of it, without examples of use."""
    text = completion.replace("\t", "    ")
    for phrase in BEHIND:
        text = text.rpartition(phrase)[2]
    fence = re.search(r"```python\n?(.*?)(```|\Z)", text, re.DOTALL)
    text = fence[1] if fence else text
    for example in EXAMPLES:
        text = text.partition(example)[0]
    return text


def runs(program: str, seconds: int = SECONDS, memory: int = MEMORY_BYTES) -> bool:
    """Whether a program runs to its end without an exception, in a process with limited time, memory and file size.

    It starts in an empty folder, without input, and everything it started is ended with it. That is no sandbox.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="replace")
        limits = map(str, (seconds, memory, FILE_BYTES, PASSED))
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", BOOTSTRAP, str(path), *limits],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=WAITING * seconds) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
