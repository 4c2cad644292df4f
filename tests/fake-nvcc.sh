#!/bin/sh
# Stands in for NVIDIA's compiler where GPU code is only type-checked: answers for its version and writes empty outputs.
directory= source=
while [ $# -gt 0 ]; do
    case $1 in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    -o) shift && : >"$1" ;;
    --output-directory) shift && directory=$1 ;;
    *.cu) source=$(basename "$1" .cu) ;;
    esac
    shift
done
if [ -n "$directory" ] && [ -n "$source" ]; then : >"$directory/$source.ptx"; fi
