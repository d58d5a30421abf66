"""Custom ops whose arguments are written down once, as a NamedTuple.

``torch.library`` wants a schema, an implementation, a fake implementation, what is kept for the backward and one
gradient for each argument, in the order of the arguments. All of that follows from one NamedTuple here: its
annotations are the schema, its fields the order, and the functions take it whole. An argument more is a field more.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable

import torch

from refine_kernels.precision import no_autocast

_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    list[int]: "SymInt[]",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
}


def custom_op(
    name: str, arguments: type[tuple], returns: str, fake: Callable
) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Make ``function(arguments) -> tensors`` the op ``refine_kernels::<name>``, which is called with the fields.

    Args:
        name: of the op.
        arguments: a NamedTuple; its first field is a tensor.
        returns: the schema's, ``"(Tensor, Tensor)"`` or ``"Tensor[]"``.
        fake: the same function of tensors without values: shapes, dtypes and devices of the result.

    Autocast is off in the function.
    """

    def decorate(function: Callable) -> torch.library.CustomOpDef:
        def run(*given):
            with no_autocast(given[0]):
                return function(arguments(*given))

        schema = f"({', '.join(_schema(arguments))}) -> {returns}"
        op = torch.library.custom_op(f"refine_kernels::{name}", run, mutates_args=(), schema=schema)
        op.register_fake(lambda *given: fake(arguments(*given)))
        return op

    return decorate


def differentiate(
    op: torch.library.CustomOpDef,
    arguments: type[tuple],
    save: Callable,
    gradients: Callable,
    materialize: bool = False,
) -> None:
    """Give ``op`` a backward.

    Args:
        arguments: the op's NamedTuple.
        save: ``save(ctx, arguments, output)`` keeps what the backward needs.
        gradients: ``gradients(ctx, *upstream)`` returns gradients by the names of fields; the others are None.
            An upstream gradient is None where an output was not used.
        materialize: it is zeros there instead.
    """

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(materialize)
        save(ctx, arguments(*inputs), output)

    def backward(ctx, *upstream):
        found = gradients(ctx, *upstream) if any(x is not None for x in upstream) else {}
        return tuple(found.get(name) for name in arguments._fields)

    op.register_autograd(backward, setup_context=setup)


def _schema(arguments: type[tuple]) -> list[str]:
    """One entry for each field: its type, its name and, where it has one, its default (a string or an int)."""
    entries = []
    for name, annotation in typing.get_type_hints(arguments).items():
        default = arguments._field_defaults.get(name)
        entries.append(
            f"{_TYPES[annotation]} {name}" + ("" if default is None else f"={json.dumps(default)}")
        )
    return entries
