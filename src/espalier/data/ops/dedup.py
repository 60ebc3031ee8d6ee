"""Exact duplicates: of documents with the same text, the first stays."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from espalier.data.sources import Document


def text_hash(text: str) -> bytes:
    """A 16-byte digest of a text: the document's identity, whatever its origin."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def unique(documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
    """The documents whose text hasn't come before; the others are counted in `dropped`.

    Memory: about 100 bytes a distinct document.
    """
    seen: set[bytes] = set()
    for document in documents:
        identity = text_hash(document.text)
        if identity in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(identity)
        yield document
