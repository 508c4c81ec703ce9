"""Which biases and norms follow which kernel, by what they act on."""

from collections.abc import Callable, Mapping

from tb_optax.forward.reading import kernel_products
from tb_optax.forward.record import Feed, Follower, Record

# Path of a kernel; None for what is no layer, such as an embedding.
Target = str | None

# From the layers whose outputs a norm acts on, and those that it feeds, to its own.
Policy = Callable[[list[Target], list[Target]], list[Target]]


def _after(acts_on: list[Target], _: list[Target]) -> list[Target]:
    return acts_on


def _before(acts_on: list[Target], feeds: list[Target]) -> list[Target]:
    return feeds[:1] or acts_on


def _none(_: list[Target], __: list[Target]) -> list[Target]:
    return []


POLICIES: Mapping[str, Policy] = {"after": _after, "before": _before, "none": _none}


def followers(record: Record, policy: Policy) -> dict[str, str]:
    """The kernel that each follower follows.

    A leaf that acts on the outputs of several kernels follows none of them, and
    one that acts on an embedding follows nothing.
    """
    paths = {product.number: product.path for product in kernel_products(record)}
    acts_on: dict[str, list[Target]] = {}
    feeds: dict[str, list[Target]] = {}
    norms = set()
    for event in record.events:
        if isinstance(event, Follower):
            _append(acts_on.setdefault(event.path, []), paths.get(event.number))
            if event.norm:
                norms.add(event.path)
        elif isinstance(event, Feed) and event.number in paths:
            _append(feeds.setdefault(event.path, []), paths[event.number])
    found = {}
    for path in [p for p in record.shapes if p in acts_on or p in feeds]:
        kernels = acts_on.get(path, [])
        if (path in norms or path in feeds) and len(kernels) < 2:
            kernels = policy(kernels, feeds.get(path, []))
        if len(kernels) == 1 and kernels[0] is not None:
            found[path] = kernels[0]
    return found


def _append(names: list[Target], name: Target) -> None:
    if name not in names:
        names.append(name)
