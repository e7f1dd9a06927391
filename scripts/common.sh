# Shared by the scripts beside it. Source it; it changes to the project's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.9
UV_VENV=.venv-uv # uv lives apart: it resolves and, where needed, installs torch, and is no part of what runs

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() {
  printf '\033[31merror:\033[0m %s\n' "$*" >&2
  exit 1
}

# The first Python that this release supports; PYTHON overrides it.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "The lock files are for Python 3.11, and none was found. Install it (Debian: apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python3.11."
}

make_venv() { # FOLDER
  [ -x "$1/bin/pip" ] && return
  say "Making $1"
  "$(find_python)" -m venv "$1" || fail "No virtual environment could be made. On Debian: apt-get install python3.11-venv"
}

# uv's own executable, installed on first use.
find_uv() {
  if [ ! -x "$UV_VENV/bin/uv" ]; then
    make_venv "$UV_VENV" && "$UV_VENV/bin/pip" install --quiet "uv==$UV_VERSION" >&2
  fi
  echo "$UV_VENV/bin/uv"
}
