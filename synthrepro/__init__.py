"""Segmenting with synthetic data: five papers, re-implemented, re-run and judged in the open."""

__version__ = "0.1.0"
