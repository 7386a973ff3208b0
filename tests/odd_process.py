"""Runs a config in which process 1 differs: `odd_process.py HOW ARGUMENTS...`.

HOW is 'raises', 'hangs' (while it reads), 'stops' (by SIGSTOP) or 'deadlocks' at update 5,
or an argument that only process 1 gets.
"""

import os
import signal
import sys
import time

from finetune_jax import main


def odd(how):
    """Has update 5 of this process go wrong."""
    from finetune_jax.training.updates.phase_run import PhaseRun

    call = PhaseRun.call

    def wrong(self, placed, stop, **given):
        if self.step == 5 and how == "raises":
            raise ValueError("photo 17 cannot be read")
        if self.step == 5 and how == "hangs":
            self.feed.call = lambda *_: time.sleep(1000)
        if self.step == 5 and how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.step == 5 and how == "deadlocks":
            from finetune_jax.parallel import processes

            processes.wait_for_all("nobody else waits here")
        return call(self, placed, stop, **given)

    PhaseRun.call = wrong


if __name__ == "__main__":
    how, *rest = sys.argv[1:]
    sys.argv[1:] = rest
    if os.environ["JAX_PROCESS_ID"] == "1":
        if how.startswith("--"):
            sys.argv.append(how)
        else:
            odd(how)
    main.main()
