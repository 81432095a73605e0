"""Device memory in the checkpoint, by the CUDA driver's own process checkpoint interface.

The driver copies a process's device memory into that process's host memory and lets go of the GPU; after that
CRIU can save the process like any other. This room does everything around that: which processes hold a CUDA
context, the order of calls and what to do when one fails (``story``), what must be refused beforehand
(``preflight``), what a container needs to see a GPU (``cdi``), and what a checkpoint depends on (``platform``).

It does not touch runc or CRIU, and it imports nothing but the standard library, nvidia-ml-py and PyYAML, so that
``script/gpu-check`` runs on a machine that has nothing of ours installed. docs/gpu.md says what was tried on what.
"""

from relume.gpu.client import DriverHelper
from relume.gpu.driver import DriverError, GpuDriver, ProcessState
from relume.gpu.nvml import Gpu, Machine
from relume.gpu.preflight import Budget, preflight
from relume.gpu.story import GpuCheckpointer, Suspended

__all__ = [
    "Budget",
    "DriverError",
    "DriverHelper",
    "Gpu",
    "GpuCheckpointer",
    "GpuDriver",
    "Machine",
    "ProcessState",
    "Suspended",
    "preflight",
]
