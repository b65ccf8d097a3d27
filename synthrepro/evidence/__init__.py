"""Evidence: what is measured, how it is kept, and what it decides. Knows nothing of any one paper; imports no torch."""

from synthrepro.evidence.context import Context
from synthrepro.evidence.experiments import Cell, Config, Experiment, Result, chapters, load_chapter
from synthrepro.evidence.measure import measure
from synthrepro.evidence.profiles import load_profile
from synthrepro.evidence.records import Provenance, Record, publish, records

__all__ = [
    "Cell",
    "Config",
    "Context",
    "Experiment",
    "Provenance",
    "Record",
    "Result",
    "chapters",
    "load_chapter",
    "load_profile",
    "measure",
    "publish",
    "records",
]
