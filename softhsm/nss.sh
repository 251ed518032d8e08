#!/bin/sh
# Bring up an NSS softokn token in a directory of its own, for development and tests: a second PKCS#11 module beside
# SoftHSM2. It is no security boundary: NSS ignores CKA_UNWRAP_TEMPLATE and wraps keys that are not extractable.
#   sh nss.sh DIR               makes the token that is not there yet; a second run changes nothing
# DIR/pin holds a random PIN, DIR/key4.db and DIR/cert9.db the token. No daemon and no root are needed.
set -eu
umask 077
dir=${1:?usage: nss.sh DIR}
command -v certutil >/dev/null || {
    echo "NSS's certutil is not installed: run 'apt-get install libnss3 libnss3-tools' (Debian, Ubuntu) as root" >&2
    exit 69
}
mkdir -p "$dir"
chmod 700 "$dir"
dir=$(cd "$dir" && pwd)
[ ! -e "$dir/pin" ] || exit 0
rm -f "$dir/key4.db" "$dir/cert9.db" "$dir/pkcs11.txt" # a database without its PIN file is made anew
od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/pin.new"
certutil -N -d "sql:$dir" -f "$dir/pin.new"
mv "$dir/pin.new" "$dir/pin"
