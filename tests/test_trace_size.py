"""Tracing costs nothing with the size of a model."""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("model", "layers", "seconds"), [("llama", 80 * 7 + 1, 5), ("resnet152", 156, 3)]
)
def test_large_models_are_traced_in_seconds_and_take_no_memory(model, layers, seconds):
    """152 layers of the residual net, and the shortcuts of its four stages."""
    script = pathlib.Path(__file__).with_name("large_models.py")
    command = [sys.executable, str(script), model]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    count, took, megabytes = map(float, result.stdout.split())
    assert count == layers
    assert took < seconds
    assert megabytes < 200
