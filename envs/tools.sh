#!/usr/bin/env bash
# What the tests need beside Python packages. Installs what is missing as root on Debian and Ubuntu; says what to install elsewhere.
# Tests that need one of these fail by name where it is missing; none is skipped.
set -euo pipefail
say() { echo "setup: $*" >&2; }

missing=()
while read -r package program; do
  command -v "$program" >/dev/null || missing+=("$package")
done <<'LIST'
bubblewrap bwrap
git git
util-linux setpriv
python3 /usr/bin/python3
LIST
command -v chromium chromium-browser google-chrome >/dev/null || missing+=(chromium)
[ ${#missing[@]} -gt 0 ] || exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  say "installing for the tests: ${missing[*]}"
  log=$(mktemp)
  { apt-get update && DEBIAN_FRONTEND=noninteractive $install; } </dev/null >"$log" 2>&1 || { tail -5 "$log" >&2; say "that failed: their tests will fail"; }
  rm -f "$log"
else
  say "tests need ${missing[*]} and will fail without; as root on Debian or Ubuntu: $install"
fi
