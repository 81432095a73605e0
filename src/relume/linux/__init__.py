"""The kernel: system calls and /proc, /sys access that the standard library lacks. Nothing else.

Everything here is a thin, typed call that raises OSError with the path or the object in it; no policy, no
state, no logging. Stdlib only, because the keeper imports it.
"""
