#!/usr/bin/env bash
# English of many kinds for `gemmascope-fast train --text FILE`: the quotations of Debian's package `fortunes`.
#     scripts/quotations.sh FILE
set -euo pipefail
out=$(realpath -m "${1:?expected the name of the file to write}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download -q fortunes
dpkg -x fortunes_*.deb .
cd usr/share/games/fortunes
# one after the other, without the lines that part them
cat people science wisdom art law work humorists platitudes tao education medicine | grep -v '^%$' > "$out"
