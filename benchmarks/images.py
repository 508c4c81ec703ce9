"""Images and labels in memory, and their way into a network."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Random crop, horizontal flip, and normalization, inside the jitted step.

    Attributes:
        mean: mean of each channel, in gray levels.
        std: standard deviation of each channel, in gray levels.
        pad: black pixels added on every side before the crop to the old size.
        flip: whether half of the images are mirrored.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    @classmethod
    def of(cls, images: np.ndarray, *, pad: int, flip: bool) -> "Preparation":
        """Take mean and standard deviation from the training images."""
        levels, channels = np.arange(256.0), images.reshape(-1, images.shape[-1]).T
        # Exact, and without a copy of the images in floating point.
        counts = [np.bincount(channel, minlength=256) for channel in channels]
        shares = np.stack(counts) / channels.shape[1]
        mean = shares @ levels
        std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1))
        # A channel without any contrast keeps its scale.
        std[std == 0] = 1
        return cls(tuple(mean.tolist()), tuple(std.tolist()), pad, flip)

    def normalize(self, images: Array) -> Array:
        """Return float32 images with mean 0 and standard deviation 1 per channel."""
        mean, std = jnp.float32(self.mean), jnp.float32(self.std)
        return (images.astype(jnp.float32) - mean) / std

    def augment(self, key: Array, images: Array) -> Array:
        """Return randomly cropped and flipped images, normalized."""
        crop_key, flip_key = jax.random.split(key)
        pad = self.pad
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * pad + 1)

        def crop(image: Array, corner: Array) -> Array:
            start = (corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(image, start, images.shape[1:])

        images = jax.vmap(crop)(padded, corners)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        return self.normalize(images)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to train on, to test on, and maybe held out, in a fixed order.

    Attributes:
        parts: arrays of each part by its name: images (N, H, W, C) in uint8 and labels
            (N,) in int32, or text. The validation rows are held out of the training.
        num_classes: number of labels.
        preparation: the way of images into a network.
    """

    parts: Mapping[str, tuple[np.ndarray, ...]]
    num_classes: int
    preparation: Any = None

    @functools.cached_property
    def digest(self) -> str:
        """A SHA-256 over everything that a run reads."""
        digest = hashlib.sha256()
        for array in itertools.chain(*self.parts.values()):
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
        return digest.hexdigest()
