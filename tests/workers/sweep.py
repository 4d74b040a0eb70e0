"""One sweep, in a process that a test may kill. Run by runpy.run_path with the globals `arguments` and `settings`."""

import os
import sys
from typing import Any

from megadit.tuning.sweep import sweep

given: dict[str, Any] = dict(globals())
os.environ["OMP_NUM_THREADS"] = "1"
sys.exit(sweep(*given["arguments"], **given["settings"]))
