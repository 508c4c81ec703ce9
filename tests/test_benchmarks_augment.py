"""Normalisation and augmentation of images."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data.augment import Preparation


def test_normalisation_is_that_of_numpy():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    images[..., 1] = 7
    preparation = Preparation.of(images, pad=2, flip=True)
    np.testing.assert_allclose(preparation.mean, images.mean((0, 1, 2)))
    std = images.std((0, 1, 2))
    np.testing.assert_allclose(preparation.std, [std[0], 1, std[2]])
    normal = np.asarray(preparation.normalise(jnp.asarray(images)))
    assert np.abs(normal.mean((0, 1, 2))).max() < 1e-6
    assert np.abs(normal.std((0, 1, 2)) - [1, 0, 1]).max() < 1e-6


def test_augmentation_crops_and_flips():
    # Every pixel has a value of its own, so a crop is found by its corner.
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    preparation = Preparation((0.0,), (1.0,), pad=1, flip=True)
    images = jnp.asarray(np.repeat(image, 200, axis=0))
    seen = np.unique(preparation.augment(jax.random.key(0), images), axis=0)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    crops = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    expected = np.unique(crops + [crop[:, ::-1] for crop in crops], axis=0)
    np.testing.assert_array_equal(seen, expected)
