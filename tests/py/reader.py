"""Reads a mounted file again and again until it is told to stop, and fails at the first wrong byte or error.

reader.py MODE FILE SHA256 SIZE STOP: MODE is read, direct, mmap or names; it stops when the file STOP exists and prints how often it
has read everything.
"""
import hashlib
import mmap
import os
import random
import sys

mode, path, wanted, size, stop = sys.argv[1:6]
size = int(size)
BLOCK = 1 << 20


def check(digest, what):
    if digest.hexdigest() != wanted:
        raise SystemExit(f"{what}: wrong bytes")


def uncached(file):
    """The kernel drops what it has of the file, so that it asks again."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def read():
    file = os.open(path, os.O_RDONLY)
    uncached(file)
    digest, at = hashlib.sha256(), 0
    while at < size:
        # Pieces of odd lengths, and never fewer bytes than there are.
        length = min(random.choice([4096, 65537, BLOCK]), size - at)
        piece = os.pread(file, length, at)
        if len(piece) != length:
            raise SystemExit(f"{len(piece)} of {length} bytes at {at}")
        digest.update(piece)
        at += length
    os.close(file)
    check(digest, mode)


def direct():
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    digest, at = hashlib.sha256(), 0
    while at < size:
        length = os.preadv(file, [buffer], at)
        if length != min(BLOCK, size - at):
            raise SystemExit(f"{length} bytes at {at}")
        digest.update(buffer[:length])
        at += length
    os.close(file)
    check(digest, mode)


def mapped():
    file = os.open(path, os.O_RDONLY)
    uncached(file)
    view = mmap.mmap(file, size, prot=mmap.PROT_READ)
    # The mapping outlives its descriptor.
    os.close(file)
    # In the order of an engine that jumps from tensor to tensor.
    places = list(range(0, size, BLOCK))
    random.shuffle(places)
    for at in places:
        view[at]
    check(hashlib.sha256(view), mode)
    view.close()


def names():
    directory = os.path.dirname(path)
    repository = directory.rpartition(":")[0]
    listed = sorted(os.listdir(directory))
    for _ in range(20):
        if sorted(os.listdir(directory)) != listed:
            raise SystemExit("another listing")
        os.listdir(repository)
        unknown = f"nothing-{random.getrandbits(60)}"
        for absent in (f"{directory}/{unknown}", f"{os.path.dirname(repository)}/{unknown}/{unknown}.json"):
            try:
                os.stat(absent)
            except FileNotFoundError:
                continue
            raise SystemExit(f"{absent} is there")
        with open(path, "rb") as file:
            file.seek(random.randrange(size))
            if not file.read(1):
                raise SystemExit("nothing read")
        if os.stat(path).st_size != size:
            raise SystemExit("another size")
        # A directory that nobody has looked up before.
        if not os.path.isdir(f"{os.path.dirname(repository)}/{unknown}"):
            raise SystemExit("a spelled name is no directory")


work = {"read": read, "direct": direct, "mmap": mapped, "names": names}[mode]
count = 0
while not os.path.exists(stop):
    work()
    count += 1
print(count)
