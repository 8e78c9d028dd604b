"""Ctrl-C that Python dropped."""

import subprocess
import sys


def test_an_interrupt_that_python_drops_is_raised_again():
    """In a callback of the garbage collector KeyboardInterrupt is ignored: the run would go on for hours."""
    code = """
import gc, os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from slt_jax.cli.keyboard import keep_interrupts
keep_interrupts()
def collecting(phase, info):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
gc.callbacks.append(collecting)
try:
    gc.collect()
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
