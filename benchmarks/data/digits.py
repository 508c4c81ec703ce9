"""The handwritten digits that come with scikit-learn: 1,797 images of 8x8 pixels."""

from typing import Any

import numpy as np
import sklearn.datasets

TEST_ROWS = 360

Split = tuple[np.ndarray, np.ndarray]


def read() -> tuple[Split, Split]:
    """Return training (1,437) and test (360) images and labels.

    The file is in the order of its writers; one fixed shuffle, the same for every
    seed of a run, comes before the split.
    """
    pixels: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(pixels["target"]))
    # Grey levels are whole numbers from 0 to 16.
    images = np.asarray(pixels["images"], np.uint8)[order, :, :, None]
    labels = np.asarray(pixels["target"], np.int32)[order]
    return (
        (images[:-TEST_ROWS], labels[:-TEST_ROWS]),
        (images[-TEST_ROWS:], labels[-TEST_ROWS:]),
    )
