#!/bin/sh
# install-torch.sh PYTHON VERSION: the CUDA build of torch where there is an NVIDIA GPU, the CPU build elsewhere.
#
# The CPU build is gigabytes smaller, but not every package index has it; where it can't be had, the index's own
# build is taken. TORCH_INDEX=URL names an index that has it.
set -eu
python=$1 version=$2
pip="$python -m pip install --quiet"
[ -z "${TORCH_INDEX:-}" ] || pip="$pip --extra-index-url $TORCH_INDEX"

if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
  if $pip "torch==$version+cpu" 2>/dev/null; then
    exit 0
  fi
  echo "No CPU build of torch $version here (set TORCH_INDEX to an index that has one); taking the usual build." >&2
fi
$pip "torch==$version"
