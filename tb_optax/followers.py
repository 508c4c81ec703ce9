"""Which biases and norms follow which kernel, by the names of their modules."""

import math
import re
from collections.abc import Mapping

from tb_optax.layers import MatrixAxes
from tb_optax.leaves import Leaf

BIASES = ("bias", "b")
NORM_LEAVES = ("scale", "offset", "gamma", "beta")
# Not the running mean and variance.
_LEARNED_NORM_LEAVES = (*NORM_LEAVES, *BIASES, "weight")


def followers_by_name(
    leaves: Mapping[str, Leaf], kernels: Mapping[str, MatrixAxes]
) -> dict[str, tuple[str, ...]]:
    """Paths of the biases and norms that follow each kernel, by the names of modules.

    A bias follows the only kernel of its module, a norm the convolution beside it that
    bears its name.
    """
    modules: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves.values():
        if leaf.is_array:
            modules.setdefault(leaf.module, []).append(leaf)
    kernel_of: dict[tuple[str, ...], Leaf] = {}
    for module, members in modules.items():
        inside = [leaf for leaf in members if leaf.path in kernels]
        if len(inside) == 1:
            kernel_of[module] = inside[0]
    convolutions = {_plain(module): leaf for module, leaf in kernel_of.items()}
    followers: dict[str, tuple[str, ...]] = {}
    for module, members in modules.items():
        kernel = kernel_of.get(module)
        if kernel is not None:
            paths = [leaf.path for leaf in members if leaf.name in BIASES]
        else:
            kernel = convolutions.get(_convolution_of_norm(module))
            if kernel is None:
                continue
            output = kernels[kernel.path].output
            outputs = math.prod(kernel.shape[axis] for axis in output)
            learned = [leaf for leaf in members if leaf.name in _LEARNED_NORM_LEAVES]
            if any(math.prod(leaf.shape) != outputs for leaf in learned):
                continue
            paths = [leaf.path for leaf in learned]
        followers[kernel.path] = (*followers.get(kernel.path, ()), *paths)
    return followers


def _plain(module: tuple[str, ...]) -> tuple[str, ...]:
    """`("block", "Conv_3")` -> `("block", "conv_3")`, as Haiku's `conv2_d_3`."""
    if not module:
        return ()
    return (*module[:-1], re.sub(r"conv[123]_?d", "conv", module[-1].lower()))


def _convolution_of_norm(module: tuple[str, ...]) -> tuple[str, ...]:
    """`("block", "BatchNorm_3")` -> `("block", "conv_3")`; empty for other names."""
    if not module:
        return ()
    name, count = re.subn(r"batch_?norm|bn|norm", "conv", module[-1].lower())
    return (*module[:-1], name) if count else ()
