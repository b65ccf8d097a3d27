"""Networks: thin builders over MONAI."""

from .unet import unet

__all__ = ["unet"]
