#!/bin/sh
# Everything a fresh Debian or Ubuntu needs to run and test this: Python, SoftHSM2, NSS, p11-kit, PostgreSQL, HAProxy, a virtual environment with locked
# dependencies. Idempotent; a second run takes less than a second. Root or passwordless sudo installs Debian packages;
# without, one line says what to install.
set -eu
cd "$(dirname "$0")/.."

apt_install() { # packages... ; one line and status 1 if they cannot be installed
    if [ "$(id -u)" = 0 ]; then as_root=""; elif sudo -n true 2>/dev/null; then as_root="sudo -n"; else as_root=none; fi
    if [ "$as_root" = none ] || ! command -v apt-get >/dev/null; then
        echo "please install, as root: apt-get install $*   then run this again" >&2
        exit 1
    fi
    echo "installing $*" >&2
    log=$(mktemp)
    if ! { $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" ||
        { $as_root apt-get update -qq &&
            $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; }; } >"$log" 2>&1; then
        cat "$log" >&2
        echo "please install, as root: apt-get install $*   then run this again" >&2
        exit 1
    fi
    rm -f "$log"
}

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

# SoftHSM2 serves the development node; NSS and p11-kit are the second and third module that the tests hold to its contract,
# PostgreSQL the second database.
missing=""
command -v softhsm2-util >/dev/null || missing="$missing softhsm2"
command -v certutil >/dev/null || missing="$missing libnss3-tools" # brings libnss3, the module
command -v openssl >/dev/null || missing="$missing openssl" # the time-stamping authority of the tests
command -v p11-kit >/dev/null || missing="$missing p11-kit"
ls /usr/lib/*/pkcs11/p11-kit-client.so >/dev/null 2>&1 || missing="$missing p11-kit-modules"
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing="$missing postgresql"
command -v strace >/dev/null || missing="$missing strace" # the tests let system calls fail, hang and kill
command -v systemd-analyze >/dev/null || missing="$missing systemd" # the tests have it judge the units
[ -x /usr/sbin/haproxy ] || missing="$missing haproxy" # passes TLS through to two nodes, in a test
[ -x /usr/sbin/rsyslogd ] || missing="$missing rsyslog" # a receiver of the audit log, for a test
ls /usr/lib/*/rsyslog/lmnsd_gtls.so >/dev/null 2>&1 || missing="$missing rsyslog-gnutls"
# shellcheck disable=SC2086 # a list of packages
[ -z "$missing" ] || apt_install $missing

stamp=.venv/.locked
wanted=$(cat requirements-dev.lock pyproject.toml | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted $(pwd)" ]; then exit 0; fi

python=$(find_python)
[ -n "$python" ] || { apt_install python3 python3-venv; python=$(find_python); }
[ -n "$python" ] || { echo "please install Python 3.11 or newer, then run this again" >&2; exit 1; }
"$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv

echo "making .venv with $("$python" --version)" >&2
rm -rf .venv
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
# As pip does for an installed wheel, whatever PYTHONDONTWRITEBYTECODE says: a worker starts in half the time.
.venv/bin/python -m compileall -q service keystore policy audit softhsm
echo "$wanted $(pwd)" >$stamp
