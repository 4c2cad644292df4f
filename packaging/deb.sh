#!/usr/bin/env bash
# Makes the Debian package: packaging/deb.sh [BINARY [DIR]]
#
#   BINARY   the program (default: built here with `cargo build --release`); a static one gives a package without dependencies
#   DIR      where the package goes (default: target/debian); its path is printed
#   OCIFS_DEB_VERSION   another version than that of Cargo.toml
#
# By dpkg-deb(1) itself: what a tool for Rust packages would add, the maintainer scripts and where units go, is here in any case.
# Needs dpkg-dev (dpkg-shlibdeps) and binutils (strip).
set -euo pipefail
umask 022
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
binary=${1:-}
out=${2:-${root}/target/debian}
if [[ -z ${binary} ]]; then
    (cd "${root}" && cargo build --release --locked --bin ocifs >&2)
    binary=${root}/target/release/ocifs
fi
version=${OCIFS_DEB_VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' "${root}/Cargo.toml" | head -n 1)}
architecture=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "${work}"' EXIT
tree=${work}/debian/ocifs

install -D -m 755 "${binary}" "${tree}/usr/bin/ocifs"
strip --strip-unneeded --remove-section=.comment "${tree}/usr/bin/ocifs"
install -d "${tree}/usr/sbin"
ln -s ../bin/ocifs "${tree}/usr/sbin/mount.fuse.ocifs"
ln -s ../bin/ocifs "${tree}/usr/sbin/mount.ocifs"
for unit in "${root}"/systemd/ocifs*.{service,timer}; do
    install -D -m 644 "${unit}" "${tree}/usr/lib/systemd/system/${unit##*/}"
done
install -D -m 644 "${root}/systemd/user/ocifs@.service" "${tree}/usr/lib/systemd/user/ocifs@.service"
install -d "${tree}/etc/ocifs"
"${binary}" config --template >"${tree}/etc/ocifs/config.toml"
doc=${tree}/usr/share/doc/ocifs
install -D -m 644 -t "${doc}/examples" "${root}"/systemd/models.{mount,automount}
install -D -m 644 -t "${doc}" "${root}/README.md" "${root}/packaging/debian/copyright"

# Settings to start from, pages and completions come from the program's own tables.
"${binary}" man --dir "${tree}/usr/share/man"
find "${tree}/usr/share/man" -type f -exec gzip -9n {} +
completion() { install -d "$(dirname "${tree}/$2")" && "${binary}" completions "$1" >"${tree}/$2"; }
completion bash usr/share/bash-completion/completions/ocifs
completion zsh usr/share/zsh/vendor-completions/_ocifs
completion fish usr/share/fish/vendor_completions.d/ocifs.fish

# dpkg-shlibdeps reads what the libraries' packages say; it wants a source package around it.
printf 'Source: ocifs\n\nPackage: ocifs\nArchitecture: any\n' >"${work}/debian/control"
depends=$(cd "${work}" && dpkg-shlibdeps -O debian/ocifs/usr/bin/ocifs 2>/dev/null | sed -n 's/^shlibs:Depends=//p')
install -d "${tree}/DEBIAN"
{
    printf 'Package: ocifs\nVersion: %s\nArchitecture: %s\n' "${version}" "${architecture}"
    printf 'Maintainer: %s\n' "${DEBFULLNAME:-ocifs packagers} <${DEBEMAIL:-root@localhost}>"
    printf 'Installed-Size: %s\n' "$(du -sk --apparent-size "${tree}" | cut -f1)"
    [[ -z ${depends} ]] || printf 'Depends: %s\n' "${depends}"
    printf 'Recommends: ca-certificates, fuse3\nSection: admin\nPriority: optional\n'
    cat "${root}/packaging/debian/description"
} >"${tree}/DEBIAN/control"
echo /etc/ocifs/config.toml >"${tree}/DEBIAN/conffiles"
for script in postinst prerm postrm; do
    install -m 755 "${root}/packaging/debian/${script}" "${tree}/DEBIAN/${script}"
done
(cd "${tree}" && find . -type f ! -path './DEBIAN/*' ! -path './etc/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)

# The same input gives the same package.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "${root}" log -1 --format=%ct 2>/dev/null || date +%s)}
find "${tree}" -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} +
install -d "${out}"
package=${out}/ocifs_${version}_${architecture}.deb
dpkg-deb --root-owner-group -Zxz --build "${tree}" "${package}" >&2
printf '%s\n' "${package}"
