"""Writes a directory as an eStargz layer (stargz-snapshotter docs/estargz.md): make_estargz.py DIR OUT CHUNK; prints the TOC's digest
and that of the uncompressed tar."""

import gzip
import hashlib
import io
import json
import os
import struct
import sys
import tarfile


def member(data: bytes) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as stream:
        stream.write(data)
    return out.getvalue()


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def main() -> None:
    root, target, chunk = sys.argv[1], sys.argv[2], int(sys.argv[3])
    layer, tar, entries = bytearray(), bytearray(), []

    def add(data: bytes) -> int:
        """Appends a gzip member and returns where it begins."""
        start = len(layer)
        layer.extend(member(data))
        tar.extend(data)
        return start

    pad = b""
    for folder, folders, files in sorted(os.walk(root)):
        folders.sort()
        for name in sorted(folders + files):
            path = os.path.join(folder, name)
            info = tarfile.TarFile.gettarinfo(tarfile.open(fileobj=io.BytesIO(), mode="w"), path)
            info.name = os.path.relpath(path, root)
            entry = {"name": info.name, "mode": info.mode, "modtime": "2025-01-01T00:00:00Z"}
            add(pad + info.tobuf(tarfile.PAX_FORMAT))
            pad = b""
            if info.issym():
                entries.append(entry | {"type": "symlink", "linkName": info.linkname})
            elif info.isdir():
                entries.append(entry | {"type": "dir", "name": info.name + "/"})
            else:
                content = open(path, "rb").read()
                entry |= {"type": "reg", "size": len(content), "digest": digest(content)}
                for at in range(0, len(content), chunk):
                    piece = content[at : at + chunk]
                    place = {"offset": add(piece), "chunkDigest": digest(piece)}
                    if at:
                        entries.append({"type": "chunk", "name": info.name, "chunkOffset": at} | place)
                    else:
                        entries.append(entry | place)
                    if at + chunk < len(content):
                        entries[-1]["chunkSize"] = chunk
                if not content:
                    entries.append(entry)
                pad = bytes(-len(content) % 512)
    toc = json.dumps({"version": 1, "entries": entries}).encode()
    info = tarfile.TarInfo("stargz.index.json")
    info.size = len(toc)
    start = len(layer)
    if pad:
        start = len(layer) + len(member(pad))
        add(pad)
    add(info.tobuf() + toc + bytes(-len(toc) % 512) + bytes(1024))
    # An empty gzip member: header with an extra field, an empty stored block, CRC and length.
    extra = b"SG" + struct.pack("<H", 22) + b"%016x" % start + b"STARGZ"
    footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\0\0\xff\xff" + bytes(8)
    assert len(footer) == 51
    layer.extend(footer)
    assert gzip.decompress(bytes(layer)) == bytes(tar)
    with open(target, "wb") as out:
        out.write(layer)
    print(digest(toc), digest(bytes(tar)))


main()
