"""Which training rows are held out for validation."""

import dataclasses

import pytest

from benchmarks import configs, data


def rows_of(images):
    """Which row of the digits each image is; all differ."""
    digits = data.load(configs.DIGITS)
    row = {image.tobytes(): index for index, image in enumerate(digits.train_images)}
    return [row[image.tobytes()] for image in images]


@pytest.mark.parametrize("subset", [None, 1000])
def test_validation_rows_are_held_out(subset):
    def split(validation, seed=43):
        config = dataclasses.replace(
            configs.DIGITS, subset=subset, validation=validation, seed=seed
        )
        dataset = data.load(config)
        assert len(dataset.validation_labels) == validation
        return (
            rows_of(dataset.train_images),
            rows_of(dataset.validation_images),
            dataset.digest(),
        )

    train, held_out, digest = split(200)
    assert split(200, seed=7) == (train, held_out, digest)
    assert train == sorted(train)
    assert not set(train) & set(held_out)
    if subset is None:
        assert sorted(train + held_out) == list(range(1437))
    else:
        assert train == list(range(subset))
        assert min(held_out) >= subset
    assert set(held_out) < set(split(201)[1])
    assert digest != split(201)[2]
