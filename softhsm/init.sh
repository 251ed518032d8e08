#!/bin/sh
# Bring up SoftHSM2 tokens in a directory of their own, for development and tests. Never for production keys.
#   sh init.sh DIR LABEL...     makes the tokens that are not there yet; a second run changes nothing
# DIR/softhsm2.conf is the configuration (SOFTHSM2_CONF), DIR/<label>.pin and DIR/<label>.so-pin hold random PINs.
# softhsm2-util takes PINs as arguments, visible in the process list: acceptable for a throw-away token only.
set -eu
umask 077
dir=${1:?usage: init.sh DIR LABEL...}
shift
[ $# -gt 0 ] || { echo "usage: init.sh DIR LABEL..." >&2; exit 64; }
command -v softhsm2-util >/dev/null || {
    echo "softhsm2 is not installed: run 'apt-get install softhsm2' (Debian, Ubuntu) as root" >&2
    exit 69
}
mkdir -p "$dir/tokens"
chmod 700 "$dir" "$dir/tokens"
dir=$(cd "$dir" && pwd)
if [ ! -e "$dir/softhsm2.conf" ]; then
    # Debian's build has the file backend only. reset_on_fork: a forked child that uses an inherited handle fails loudly.
    cat >"$dir/softhsm2.conf" <<CONF
directories.tokendir = $dir/tokens
objectstore.backend = file
log.level = ERROR
slots.removable = false
library.reset_on_fork = true
CONF
fi
export SOFTHSM2_CONF="$dir/softhsm2.conf"
for label in "$@"; do
    [ ! -e "$dir/$label.pin" ] || continue
    od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/$label.pin.new"
    od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/$label.so-pin"
    softhsm2-util --init-token --free --label "$label" --pin "$(cat "$dir/$label.pin.new")" \
        --so-pin "$(cat "$dir/$label.so-pin")" >/dev/null
    mv "$dir/$label.pin.new" "$dir/$label.pin" # last: a token without its PIN file is made anew
done
