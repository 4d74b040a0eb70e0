"""How a process of ours ends."""

DONE = 0
FAILED = 1
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: with a checkpoint; the same command goes on
INTERRUPTED_WITH_NOTHING = 130  # as a shell reports SIGINT: there was nothing to save
