"""From uint8 images to network inputs, inside the jitted step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Random crop, horizontal flip, normalisation.

    Attributes:
        mean: mean of each channel, in grey levels.
        std: standard deviation of each channel, in grey levels.
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
        channels = images.reshape(-1, images.shape[-1]).T
        levels = np.arange(256.0)
        mean, std = [], []
        for channel in channels:
            # Exact, and without a copy of the images in floating point.
            weights = np.bincount(channel, minlength=256) / channel.size
            centre = float(weights @ levels)
            mean.append(centre)
            # A channel without any contrast is left at its scale.
            std.append(float(np.sqrt(weights @ (levels - centre) ** 2)) or 1.0)
        return cls(tuple(mean), tuple(std), pad, flip)

    def normalise(self, images: Array) -> Array:
        """Return float32 images with mean 0 and standard deviation 1 per channel."""
        mean, std = jnp.float32(self.mean), jnp.float32(self.std)
        return (images.astype(jnp.float32) - mean) / std

    def augment(self, key: Array, images: Array) -> Array:
        """Return randomly cropped and flipped images, normalised."""
        count, height, width, channels = images.shape
        crop_key, flip_key = jax.random.split(key)
        pad = self.pad
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        corners = jax.random.randint(crop_key, (count, 2), 0, 2 * pad + 1)

        def crop(image: Array, corner: Array) -> Array:
            start = (corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(image, start, (height, width, channels))

        images = jax.vmap(crop)(padded, corners)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        return self.normalise(images)
