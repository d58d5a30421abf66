"""Messages for a name that does not exist: what was given, and the nearest name that does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """``": did you mean 'hidden_size'?"``, or nothing where no name is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]!r}?" if near else ""


NOT_IMPLEMENTED = {  # keywords that other models take, and what to do instead
    "output_router_logits": "the load-balancing loss of a mixture of experts is not implemented; for TRL set "
    "router_aux_loss_coef=0.0",
    "shift_labels": "give labels, which are shifted inside, or head=NextTokenLoss(...)",
}


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise the TypeError of an unexpected keyword argument, with the nearest name.

    Args:
        what: the function, as its user calls it.
        given: the keywords that it does not take.
        known: the keywords that it takes.
    """
    for name in sorted(given):
        if name in NOT_IMPLEMENTED:
            raise TypeError(f"{what} does not take {name}: {NOT_IMPLEMENTED[name]}")
        raise TypeError(f"{what} got an unexpected keyword argument {name!r}{nearest(name, known)}")
