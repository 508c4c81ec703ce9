"""Tracing costs nothing with the size of a model."""

import pathlib
import subprocess
import sys


def test_large_models_are_traced_in_seconds_and_take_no_memory():
    """Llama 3 70B, and ResNet-152 with the shortcuts of its four stages."""
    script = pathlib.Path(__file__).with_name("large_models.py")
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [(80 * 7 + 1, 5), (152 + 4, 3)]
    for line, (layers, seconds) in zip(
        result.stdout.split("\n"), expected, strict=False
    ):
        count, took, megabytes = map(float, line.split())
        assert count == layers
        assert took < seconds
        assert megabytes < 200
