#!/usr/bin/env bash
# Shows that the tests find bugs: plants each of those in tests/planted in a copy of the sources, and runs the tests that have to find
# it. Each patch names them (`run:`) and what they have to say (`says:`). Without bugs the same tests must pass.
#
#   tests/planted.sh [BUG…]
#
# It compiles the program twice for each bug, which takes minutes: so it is not among what every change has to pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=$PWD copy=$PWD/target/planted/source log=$PWD/target/planted/log
export CARGO_TARGET_DIR=$PWD/target/planted/target CARGO_TERM_COLOR=never
patches=("${@/#/tests/planted/}")
patches=("${patches[@]/%/.patch}")
((${#})) || patches=(tests/planted/*.patch)

mkdir -p "${copy}"
# A file that differs has a new time, for that is what cargo looks at.
git ls-files -z --cached --others --exclude-standard | rsync --archive --no-times --checksum --delete-missing-args --from0 --files-from=- . "${copy}/"

# field NAME PATCH: the values of its lines in what is written before the patch.
field() { sed -n "/^--- /q; s/^$1: //p" "$2"; }

# run COMMAND: in the copy.
run() { (cd "${copy}" && timeout 900 $1 >"${log}" 2>&1); }

mapfile -t commands < <(for patch in "${patches[@]}"; do field run "${patch}"; done | sort -u)
for command in "${commands[@]}"; do
    run "${command}" || { tail -n 40 "${log}"; echo "planted: \`${command}\` fails without any bug" >&2; exit 1; }
done

missed=()
for patch in "${patches[@]}"; do
    name=$(basename "${patch}" .patch)
    (cd "${copy}" && patch --quiet --strip=1 <"${root}/${patch}")
    mapfile -t commands < <(field run "${patch}")
    mapfile -t says < <(field says "${patch}")
    for at in "${!commands[@]}"; do
        begun=${SECONDS}
        if run "${commands[at]}" || ! grep -qF -- "${says[at]}" "${log}"; then
            missed+=("${name}")
            tail -n 40 "${log}"
            printf 'planted: %-24s NOT FOUND by %s\n' "${name}" "${commands[at]}"
        else
            printf 'planted: %-24s found by %s in %s s\n' "${name}" "${commands[at]}" "$((SECONDS - begun))"
        fi
    done
    (cd "${copy}" && patch --quiet --strip=1 --reverse <"${root}/${patch}")
done
((${#missed[@]} == 0)) || { echo "planted: not found: ${missed[*]}" >&2; exit 1; }
