# CRIU: the distribution's own where it is new enough, else built from Debian's source archive into a private prefix.
# To be sourced after common.sh.

# What building CRIU needs beyond a compiler; names that Debian and Ubuntu share. Without TLS (for a page server that
# we have no use for) and nftables (for a lock of the network that we don't take): the fourteen libraries behind them
# are half of the time that it takes to start CRIU, which every restore does twice.
CRIU_BUILD_PACKAGES=(
    build-essential pkgconf protobuf-compiler protobuf-c-compiler python3-protobuf
    libprotobuf-dev libprotobuf-c-dev libnl-3-dev libnl-genl-3-dev libnet1-dev libcap-dev
    uuid-dev libbsd-dev libaio-dev
)

# criu_version PATH: prints "4.2.1", or nothing where PATH is no CRIU that starts.
criu_version() { "$1" --version 2>/dev/null | sed -n 's/^Version: *\([0-9.]*\).*/\1/p' || true; }

# The version that apt would install, without Debian's revision; nothing where there is none.
criu_of_distribution() {
    apt-cache policy criu 2>/dev/null | sed -n 's/^ *Candidate: *\([0-9][0-9.]*\).*/\1/p'
}

# Where Debian's pool can be had, best first. Any mirror will do: the archive's SHA-256 is what is trusted.
criu_mirrors() {
    [ -z "${RELUME_DEBIAN_MIRROR:-}" ] || printf '%s\n' "${RELUME_DEBIAN_MIRROR%/}"
    apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian|\(.*[^/]\)\/*$/\1/p' | sort -u
    # Not a Debian machine: the mirror that debootstrap takes by default.
    sed -n 's/^default_mirror \(http.*\)$/\1/p' /usr/share/debootstrap/scripts/sid 2>/dev/null || true
    # Debian removes a version from its pool when a newer one replaces it; the snapshot archive keeps all.
    printf '%s\n' https://snapshot.debian.org/archive/debian/20261101T000000Z
}

criu_archive_is_right() {
    [ -f "$CACHE/$CRIU_ARCHIVE" ] && echo "$CRIU_SHA256  $CACHE/$CRIU_ARCHIVE" | sha256sum --check --status
}

# Fetches the archive through apt's own downloader (its proxy, its certificates, its credentials) into the cache.
# script/zdtm builds CRIU's test suite from the same file.
criu_fetch() {
    local mirror partial=$CACHE/.$CRIU_ARCHIVE.$$
    mkdir -p "$CACHE"
    criu_archive_is_right && return
    while read -r mirror; do
        echo "from $mirror"
        if /usr/lib/apt/apt-helper -o APT::Sandbox::User=root download-file \
            "$mirror/pool/main/c/criu/$CRIU_ARCHIVE" "$partial" "SHA256:$CRIU_SHA256"; then
            mv "$partial" "$CACHE/$CRIU_ARCHIVE"
            criu_archive_is_right && return
        fi
        rm -f "$partial"
    done < <(criu_mirrors)
    echo "no mirror gave $CRIU_ARCHIVE with SHA-256 $CRIU_SHA256"
    return 1
}

# Builds in a temporary directory and renames the finished prefix into place: an interrupted build leaves nothing.
criu_build() (
    work=$(mktemp -d "$CACHE/criu-build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    tar -xf "$CACHE/$CRIU_ARCHIVE" -C "$work" --strip-components=1
    # RUNDIR goes into the binary: see CRIU_RUNDIR in common.sh.
    make -C "$work" -j"$(nproc)" NO_GNUTLS=1 RUNDIR="$CRIU_RUNDIR" criu/criu
    mkdir -p "$work/prefix/sbin"
    install -m 0755 "$work/criu/criu" "$work/prefix/sbin/criu"
    install -m 0644 "$work/COPYING" "$work/prefix/COPYING"
    mkdir -p "$(dirname "$CRIU_PREFIX")"
    rm -rf "$CRIU_PREFIX"
    mv "$work/prefix" "$CRIU_PREFIX"
)

# criu_link PATH: makes CRIU_LINK name PATH, by rename, so that a reader always finds one.
criu_link() {
    [ "$(readlink "$CRIU_LINK" 2>/dev/null)" != "$1" ] || return 0
    mkdir -p "$(dirname "$CRIU_LINK")"
    ln -sfn "$1" "$CRIU_LINK.$$"
    mv -T "$CRIU_LINK.$$" "$CRIU_LINK"
}
