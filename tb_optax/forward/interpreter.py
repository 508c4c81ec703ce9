"""The walk through a jaxpr."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tb_optax.forward import control
from tb_optax.forward.dimensions import fresh, resize
from tb_optax.forward.elementwise import elementwise, joined, joined_trail
from tb_optax.forward.indexing import INDEXING
from tb_optax.forward.kernels import hidden_kernels
from tb_optax.forward.primitives import CALLS, COMPUTED, ELEMENTWISE, REDUCTIONS
from tb_optax.forward.products import PRODUCTS
from tb_optax.forward.rearranging import REARRANGING, split_values
from tb_optax.forward.record import Record
from tb_optax.forward.values import (
    Constant,
    Data,
    Parameter,
    Trail,
    Value,
    computed,
    rearranged,
)

RULES = REARRANGING | INDEXING | PRODUCTS


class Interpreter:
    """Runs jaxprs on abstract values and records what happens to parameters."""

    def __init__(self, record: Record):
        self.record = record

    def run(self, jaxpr: ClosedJaxpr | Jaxpr, values: Sequence[Value]) -> list[Value]:
        """Values of the outputs of a jaxpr, from those of its inputs."""
        known: dict[Any, Value] = {}
        if isinstance(jaxpr, ClosedJaxpr):
            jaxpr = jaxpr.jaxpr

        def read(atom) -> Value:
            if isinstance(atom, Literal):
                return _literal(atom)
            return known[atom]

        for variable in jaxpr.constvars:
            known[variable] = Constant(fresh(_shape(variable)))
        known.update(zip(jaxpr.invars, values, strict=True))
        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self._apply(equation, operands)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation, values: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        shapes = [_shape(variable) for variable in equation.outvars]
        for value in values:
            if isinstance(value, Parameter):
                self.record.seen |= value.leaves
        if name in CALLS:
            return control.call(name, params, values, self.run)
        if name == "shard_map":
            results = control.shard_map(name, params, values, self.run)
            return [
                rearranged(value, shape, resize)
                for value, shape in zip(results, shapes, strict=True)
            ]
        if name == "cond":
            return control.cond(name, params, values, self.run)
        if name == "while":
            return control.while_loop(name, params, values, self.run, self.record)
        if name == "scan":
            return control.scan(name, params, values, self.run, self.record)
        if name == "split":
            return split_values(params, values, shapes, self.record)
        if name in RULES and len(shapes) == 1:
            return [RULES[name](params, values, shapes[0], self.record)]
        if name in RULES and len(shapes) == len(values):
            return [
                RULES[name](params, [value], shape, self.record)
                for value, shape in zip(values, shapes, strict=True)
            ]
        if name in ELEMENTWISE:
            return [elementwise(name, values, s, self.record) for s in shapes]
        if name in REDUCTIONS:
            return [_reduced(params, values, shapes[0])]
        return self._computed(name, values, shapes)

    def _computed(self, name, values, shapes) -> list[Value]:
        """Anything else: unknown where it takes parameters, unless it is said to be."""
        parameters = [value for value in values if isinstance(value, Parameter)]
        data = [value for value in values if isinstance(value, Data)]
        if not parameters or name in COMPUTED:
            return [joined(values, shape) for shape in shapes]
        leaves = frozenset().union(*(value.leaves for value in parameters))
        self.record.unclear(
            leaves, f"it enters {name!r}, a primitive that trace_layers does not know"
        )
        if not data:
            return [computed(leaves, shape) for shape in shapes]
        inputs = joined_trail([value.trail for value in data]).last
        last = hidden_kernels(leaves, inputs, f"it enters {name!r}", self.record)
        return [Data(fresh(shape), Trail(last=last)) for shape in shapes]


def _reduced(params, values, shape) -> Value:
    """A sum or an extremum over some axes."""
    value = joined(values, shape)
    gone = params["axes"]
    kept = tuple(dim for i, dim in enumerate(values[0].dims) if i not in gone)
    if isinstance(value, Data):
        return Data(kept, value.trail._replace(reduced=True))
    return value


def _shape(variable) -> tuple[int, ...]:
    return tuple(map(int, getattr(variable.aval, "shape", ())))


def _literal(atom: Literal) -> Constant:
    value = atom.val
    shape = getattr(value, "shape", ())
    whole = not shape and isinstance(value, (int, np.integer))
    return Constant(fresh(shape), int(value) if whole else None)
