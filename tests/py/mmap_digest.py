"""Maps a file and prints the SHA-256 of what the mapping shows: mmap_digest.py FILE [shared|private]."""

import hashlib
import mmap
import sys

flags = mmap.MAP_PRIVATE if sys.argv[2:] == ["private"] else mmap.MAP_SHARED
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as view:
    print(hashlib.sha256(view).hexdigest())
