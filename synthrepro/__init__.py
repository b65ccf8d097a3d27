"""Segmenting with synthetic data: five papers, re-implemented, re-run and judged in the open."""
