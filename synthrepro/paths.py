"""Where things stand: one checkout holds the package, the notebooks, the runs and the committed records."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
# What this machine computed: ignored by git, safe to delete, shared by every process that works on it.
RUNS = Path(os.environ.get("SYNTHREPRO_RUNS") or ROOT / "runs").resolve()
# What the book shows: committed, written by `synthrepro publish` only.
RECORDS = ROOT / "book" / "records"
# The real data sets, each in a folder of its own name and in its publishers' layout.
DATA = Path(os.environ.get("SYNTHREPRO_DATA") or ROOT / "data").resolve()
