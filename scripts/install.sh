#!/usr/bin/env bash
# Install one lock file and the project into a virtual environment: install.sh LOCK VENV, such as `install.sh cpu .venv`.
#
# A stamp keeps what was installed, so a second run takes no time and asks nobody. dev.txt holds all of cpu.txt and
# cpu.txt all of gateway.txt, version for version: whoever has the bigger one has the smaller.
source "$(dirname "$0")/common.sh"

lock=${1:?which lock: gateway, cpu, gpu or dev} venv=${2:?which folder}
[ -f "locks/$lock.txt" ] || fail "There is no locks/$lock.txt."
case $lock in
  dev) covers=(dev cpu gateway) ;;
  cpu | gpu) covers=("$lock" gateway) ;;
  *) covers=("$lock") ;;
esac

stamp_of() { # LOCK: changes with the lock, with what the project declares, and with the folder it lies in
  { cat "locks/$1.txt" pyproject.toml && pwd; } | sha256sum | cut -d ' ' -f 1
}

need_libnuma() { # the CPU engine links against it
  local libraries
  libraries=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p)
  [[ $libraries == *libnuma.so.1* ]] && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing the Debian package libnuma1"
    { apt-get update -qq && apt-get install -y -qq libnuma1; } >&2 || fail "libnuma1 could not be installed."
  else
    fail "The engine needs the library libnuma. Install it and try again: sudo apt-get install libnuma1"
  fi
}

# Torch's CPU build is published apart from the other packages. Where pip cannot find it, uv knows where it is.
install_torch_with_uv() { # REST
  local uv
  uv=$(find_uv)
  say "pip finds no CPU build of torch here; uv installs it"
  "$uv" pip install --python "$venv/bin/python" --torch-backend cpu --no-deps 'torch==2.13.0+cpu' >&2
  awk '/^[A-Za-z]/ { torch = /^torch==/ } !torch' "locks/$lock.txt" >"$1"
}

[ "$(cat "$venv/lorikeet-$lock.stamp" 2>/dev/null)" = "$(stamp_of "$lock")" ] && exit 0

[ "$lock" = gateway ] || need_libnuma
make_venv "$venv"
pip=("$venv/bin/pip" --disable-pip-version-check)
requirements=locks/$lock.txt
if grep -q '^torch==.*+cpu' "$requirements" && ! "$venv/bin/python" -c 'import torch' 2>/dev/null &&
  ! "${pip[@]}" install --quiet --no-deps --dry-run 'torch==2.13.0+cpu' >/dev/null 2>&1; then
  rest=$(mktemp)
  trap 'rm -f "$rest"' EXIT
  install_torch_with_uv "$rest"
  requirements=$rest
fi

say "Installing $(grep -c '^[A-Za-z]' "$requirements") packages of locks/$lock.txt into $venv"
# Modules are compiled when they are first imported: most never are.
"${pip[@]}" install --no-deps --no-compile --require-hashes --progress-bar off -r "$requirements" 2>&1 | scripts/progress.sh ||
  fail "pip could not install locks/$lock.txt. Once more with everything it says: $venv/bin/pip install --no-deps --require-hashes -r locks/$lock.txt"
"${pip[@]}" install --quiet --no-deps --editable . >&2
for covered in "${covers[@]}"; do stamp_of "$covered" >"$venv/lorikeet-$covered.stamp"; done
