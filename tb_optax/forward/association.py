"""Which biases and norms follow which kernel, by what they act on."""

from collections.abc import Callable, Mapping

from tb_optax.forward.record import Feed, Follower, Product, Record

# From the layers whose outputs a norm acts on, and those that it feeds, to its own.
Policy = Callable[[list[str], list[str]], list[str]]


def _after(acts_on: list[str], _: list[str]) -> list[str]:
    return acts_on


def _before(acts_on: list[str], feeds: list[str]) -> list[str]:
    return feeds[:1] or acts_on


def _none(_: list[str], __: list[str]) -> list[str]:
    return []


POLICIES: Mapping[str, Policy] = {"after": _after, "before": _before, "none": _none}


def followers(record: Record, policy: Policy) -> dict[str, str]:
    """The kernel that each follower follows.

    A leaf that acts on the outputs of several kernels follows none of them.
    """
    paths = {e.number: e.path for e in record.events if isinstance(e, Product)}
    acts_on: dict[str, list[str]] = {}
    feeds: dict[str, list[str]] = {}
    norms = set()
    for event in record.events:
        if isinstance(event, Follower):
            _append(acts_on.setdefault(event.path, []), paths[event.number])
            if event.norm:
                norms.add(event.path)
        elif isinstance(event, Feed):
            _append(feeds.setdefault(event.path, []), paths[event.number])
    found = {}
    for path in [p for p in record.shapes if p in acts_on or p in feeds]:
        kernels = acts_on.get(path, [])
        if (path in norms or path in feeds) and len(kernels) < 2:
            kernels = policy(kernels, feeds.get(path, []))
        if len(kernels) == 1:
            found[path] = kernels[0]
    return found


def _append(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)
