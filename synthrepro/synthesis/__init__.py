"""Synthesis: label map -> image, and learnable augmenters. Everything draws first, then applies the draw."""

from synthrepro.synthesis.augmenters import GaussianNoise, IntensityNonUniformity, Nonparametric, Parametric
from synthrepro.synthesis.draws import Draw
from synthrepro.synthesis.labels_to_image import LabelsToImage

__all__ = ["Draw", "GaussianNoise", "IntensityNonUniformity", "LabelsToImage", "Nonparametric", "Parametric"]
