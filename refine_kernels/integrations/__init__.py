"""Our ops inside other packages, which are imported only when a function here is called."""

from refine_kernels.integrations.fla import register_with_fla

__all__ = ["register_with_fla"]
