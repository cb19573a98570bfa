"""Weight-space arithmetic: one backend per implementation of ``protocols.Ops``.

``select_ops`` is the one place that chooses. ``torch_ops`` is the reference and runs
everywhere; ``cupy_ops`` holds the fused CUDA kernels and is the only importer of cupy.
"""

from hybridopt.kernels.select import select_ops

__all__ = ["select_ops"]
