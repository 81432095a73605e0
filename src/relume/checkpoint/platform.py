"""The platform: what must be alike for a memory image to run on.

A checkpoint names the platform it was taken on; :func:`differences` says in words why another one does not
fit. The CPU is compared by what programs choose their code by (instruction sets that glibc, BLAS and JITs
look for): a CPU that has more restores what was taken on one that has less, never the other way round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from relume.linux import cgroup

# Kernel names (/proc/cpuinfo) of what user space dispatches on; the rest of the list is the kernel's own.
_DISPATCHED = frozenset(
    """sse sse2 ssse3 sse4_1 sse4_2 popcnt aes pclmulqdq vpclmulqdq vaes avx f16c fma bmi1 bmi2 lzcnt abm movbe avx2
    avx512f avx512dq avx512cd avx512bw avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg
    avx512_vpopcntdq avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_int8 amx_bf16 sha_ni rdrand rdseed adx erms
    fsgsbase xsave xsaveopt xsavec rdpid rdtscp gfni serialize cldemote movdiri movdir64b shstk
    asimd asimdhp asimddp sve sve2 sveaes i8mm bf16 atomics lrcpc crc32 sha2 sha3 sha512 paca pacg bti mte""".split()
)


Offers = tuple[tuple[str, ...], ...]
"""The GPU facts that an instance could have here: one entry for each choice of GPUs it could be given."""

NO_GPU: Offers = ((),)
"""The one choice of an instance that asks for none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Platform:
    """``cpu`` is sorted. ``kernel`` and the versions are the strings that the programs print. ``cgroups`` is "v2" where
    that version alone is mounted, else empty: an image names the hierarchies that its processes were in."""

    arch: str
    cpu: tuple[str, ...]
    kernel: str
    criu: str
    runc: str
    gpu: tuple[str, ...] = ()
    cgroups: str = ""

    @property
    def key(self) -> str:
        """A short name: equal platforms have equal keys."""
        facts = dataclasses.asdict(self)
        if not self.cgroups:
            del facts["cgroups"]  # a later field: the names from before it stay
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Platform:
        return cls(**{**raw, "cpu": tuple(raw["cpu"]), "gpu": tuple(raw.get("gpu", ()))})


def here(*, criu: str, runc: str, gpu: tuple[str, ...] = ()) -> Platform:
    """This machine, with these versions of the engine."""
    cgroups = "v2" if cgroup.unified() else ""
    return Platform(platform.machine(), cpu_features(), os.uname().release, criu, runc, gpu, cgroups)


@cache
def cpu_features(source: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The features of the first CPU that user space dispatches on, sorted."""
    for line in source.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted(_DISPATCHED & set(value.split())))
    return ()


def differences(taken_on: Platform, here: Platform, offers: Offers | None = None) -> list[str]:
    """Why an image taken there cannot run here, one reason a line; empty when it can.

    ``offers`` are the GPUs that the instance could get; without, it has those of ``here``.
    """
    reasons = []
    for field, word in (("arch", "architecture"), ("kernel", "kernel"), ("criu", "CRIU"), ("runc", "runc")):
        then, now = getattr(taken_on, field), getattr(here, field)
        if then != now:
            reasons.append(f"{word}: taken on {then}, here {now}")
    if taken_on.cgroups != here.cgroups:
        reasons.append(f"cgroups: taken on {taken_on.cgroups or 'v1'}, here {here.cgroups or 'v1'}")
    if missing := sorted(set(taken_on.cpu) - set(here.cpu)):
        reasons.append(f"CPU: lacks {', '.join(missing)}")
    offers = (here.gpu,) if offers is None else offers
    if taken_on.gpu not in offers:
        have = " or ".join(", ".join(gpu) for gpu in offers)
        reasons.append(f"GPU: taken on {', '.join(taken_on.gpu) or 'none'}, here {have or 'none'}")
    return reasons
