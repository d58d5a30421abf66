"""Whether tensors are finite, in one pass over each."""

from __future__ import annotations

from collections.abc import Mapping

import torch


@torch.no_grad()
def first_not_finite(named: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity, or None. Of DTensors, this rank's part."""
    local = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in named.items()}
    local = {name: x for name, x in local.items() if x.is_floating_point() and x.numel()}
    by_device: dict[torch.device, list[str]] = {}
    for name, x in local.items():
        by_device.setdefault(x.device, []).append(name)
    for names in by_device.values():
        # the smallest and the largest: one pass, at the speed of memory; NaN goes through both
        ends = [torch.stack(torch.aminmax(local[name].detach())).float() for name in names]
        finite = torch.stack(ends).isfinite().all(1)
        if not finite.all():
            return names[int((~finite).nonzero()[0, 0])]
    return None
