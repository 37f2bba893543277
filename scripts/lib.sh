# shellcheck shell=bash
# Functions shared by scripts/*; source it after `set -euo pipefail`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${AVMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/avmm}
mkdir -p "$CACHE/logs"
export AVMM_CACHE=$CACHE

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Runs a step quietly: one progress line; the log is kept and named only when it fails.
step() { # step TEXT CMD...
    local text=$1 log
    shift
    log=$(mktemp "$CACHE/logs/$(basename "$0").XXXXXX")
    say "$text"
    if "$@" >"$log" 2>&1; then
        rm -f "$log"
    else
        local status=$?
        tail -n 15 "$log" >&2
        say "error: $text: failed with status $status; whole log: $log"
        return "$status"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        command -v sudo >/dev/null || die "needs root for: $*; run as root or install sudo"
        sudo "$@"
    fi
}

have_packages() {
    local p
    for p; do
        dpkg-query -W -f '${db:Status-Status}\n' "$p" 2>/dev/null | grep -qx installed || return 1
    done
}

apt_update_once() {
    [ -n "${APT_UPDATED:-}" ] || step "refreshing the package lists" as_root apt-get -q update
    APT_UPDATED=1
}

need_packages() { # installs only what is missing
    local missing=() p
    command -v apt-get >/dev/null ||
        die "this needs Debian's apt; on another system install by hand: $*"
    for p; do have_packages "$p" || missing+=("$p"); done
    [ ${#missing[@]} = 0 ] && return
    apt_update_once
    step "installing ${missing[*]}" as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qy install --no-install-recommends "${missing[@]}"
}

# True when this machine's own KVM can run a stock kernel; GROUND_REASON says why not.
# A KVM without vmx or svm under it interprets the guest and lacks instructions Linux uses.
stock_kvm() {
    if [ "${AVMM_GROUND:-}" = testbed ]; then
        GROUND_REASON="AVMM_GROUND=testbed asks for the testbed"
    elif [ ! -e /dev/kvm ]; then
        GROUND_REASON="there is no /dev/kvm"
    elif ! { true <>/dev/kvm; } 2>/dev/null; then
        GROUND_REASON="/dev/kvm cannot be opened by $(id -un)"
    elif ! grep -qwE 'vmx|svm' /proc/cpuinfo; then
        GROUND_REASON="/dev/kvm is there but the CPU shows neither vmx nor svm: a software KVM"
    else
        # shellcheck disable=SC2034  # read by callers
        GROUND_REASON="/dev/kvm works and the CPU has vmx or svm"
        return 0
    fi
    return 1
}

# Puts the project and its test tools in a virtual environment; sets VENV. Quick when nothing changed.
make_venv() {
    local stamp
    VENV=${AVMM_VENV:-$ROOT/.venv}
    need_packages build-essential pkg-config liburing-dev python3-dev python3-venv
    stamp=$(cd "$ROOT" && find pyproject.toml setup.py native src -type f \
        ! -name '*.pyc' ! -name '*.so' ! -name '*.o' ! -name avmm-agent ! -name avmm-attacker ! -name avmm-launch ! -path '*.egg-info/*' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
    [ "$(cat "$VENV/.avmm-stamp" 2>/dev/null)" = "$stamp" ] && return
    [ -x "$VENV/bin/python" ] ||
        step "creating $VENV" "$(debian_python)" -m venv "$VENV" || return
    step "building avmm into $VENV, with what it and its tests need" env AVMM_WERROR=1 \
        "$VENV/bin/pip" install -q --disable-pip-version-check "${ROOT}[test]" || return
    printf '%s\n' "$stamp" >"$VENV/.avmm-stamp"
}

# Debian's interpreter where there is one: it matches python3-dev and starts without shims.
debian_python() {
    if [ -x /usr/bin/python3 ]; then echo /usr/bin/python3; else command -v python3; fi
}
