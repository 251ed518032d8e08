module skms.invalid/verify

go 1.25

require golang.org/x/mod v0.0.0

// Copied by build.sh from the Go toolchain's own tree (src/cmd/vendor); nothing is downloaded.
replace golang.org/x/mod => ./mod
