"""One look for every figure of the book, legible on a phone and without colour vision."""

import matplotlib as mpl
from cycler import cycler

# Okabe and Ito's palette: distinct under the common kinds of colour blindness. Grey is for what is only context.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#777777"


def style() -> None:
    """Set matplotlib's defaults for this process: open axes, large letters, the palette above.

    A figure is 5.6 inches wide at 11 points, so that its letters stay readable when a phone shows it at 350 pixels.
    """
    mpl.rcParams.update(
        {
            "figure.figsize": (5.6, 3.6),
            "figure.dpi": 160,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PINK, SKY, GREY]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": "black",
            "ytick.labelcolor": "black",
            "lines.linewidth": 2,
            "legend.frameon": False,
            "image.cmap": "gray",
        }
    )
