# Shared by the scripts in this directory: where things are, how a step reports, how a step fails.
# To be sourced, under `set -euo pipefail`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=$ROOT/.venv

# The one CRIU that is built when the distribution has none that is new enough. docs/using.md tells why.
CRIU_VERSION=4.2.1
# Older ones than 4.2 read neither of the kernel's marks "dp" and "wf" of a mapping (VmFlags in /proc/PID/smaps):
# memory that may be dropped, and that a fork finds empty. A glibc of 2.41 or newer keeps the state of its random numbers
# (getrandom in the vDSO) in such memory; dumped and restored like any other, it would give the original and its copies
# the same os.urandom, uuid4 and keys for a while. Also in relume.node.doctor and relume.gpu.check_container.
CRIU_MINIMUM=4.2
CRIU_ARCHIVE=criu_$CRIU_VERSION.orig.tar.xz
CRIU_SHA256=29ec0ee09e296479fe7048c80980e8ef1d0684d0b0204c2b101dfea19f6725b9
CRIU_PREFIX=/opt/relume/criu-$CRIU_VERSION
# Where a CRIU built here keeps its kernel-feature cache (criu.kdat). A tmpfs that every machine has, so that the
# cache dies with the boot it describes. The node makes the directory, root-only.
CRIU_RUNDIR=/dev/shm/relume-criu
# Always names the CRIU to use, built or the distribution's.
CRIU_LINK=/opt/relume/bin/criu

CACHE=/var/cache/relume

say() { printf '%s\n' "$*" >&2; }

die() { # die WHAT [WHAT-TO-DO]
    say "error: $1"
    [ $# -lt 2 ] || say "  what to do: $2"
    exit 1
}

# step NAME WHAT-TO-DO COMMAND...: runs the command quietly. When it fails, says which step it was, the last lines
# the command printed, and what to do.
step() {
    local name=$1 remedy=$2 log started=$SECONDS rc=0
    shift 2
    log=$(mktemp -t relume-step.XXXXXX)
    say "- $name ..."
    "$@" >"$log" 2>&1 </dev/null || rc=$?
    if [ "$rc" -ne 0 ]; then
        say "error: step '$name' failed (exit status $rc). Its last lines:"
        tail -n 20 "$log" | sed 's/^/    /' >&2
        say "  what to do: $remedy"
        say "  everything it printed: $log"
        exit 1
    fi
    rm -f "$log"
    say "  done in $((SECONDS - started)) s"
}

# at_least WANTED HAVE: compares dotted versions, numerically.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

need_root() {
    [ "$(id -u)" -eq 0 ] || die "$1 must run as root" "run it with sudo, or in a root shell"
}
