"""XMP as cameras and their makers' software write it: one reader for all its forms.

Properties are attributes, elements, arrays or structures; packets are UTF-8 or UTF-16, several in a
file, or one in parts (ExtendedXMP; Adobe's XMP Specification Part 3, 1.1.3.1). What is damaged is
read as far as it goes. Entities are never expanded, so there are no XML bombs.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.etree import ElementTree

from archive_pipeline.flight.source_image import XMP_PREFIX

Name = tuple[str, str]
"""Namespace (URI, without what ends it) and name; those of a structure's parts have `/` in it."""

EXTENDED_PREFIX = b"http://ns.adobe.com/xmp/extension/\0"
_GUID, _NUMBERS = 32, 8  # bytes of a part's head: MD5 in hex, then length and offset
_ITXT = b"XML:com.adobe.xmp\0"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_ARRAYS = (f"{_RDF}Seq", f"{_RDF}Bag", f"{_RDF}Alt")
_HAS_EXTENDED = "{http://ns.adobe.com/xmp/note/}HasExtendedXMP"
_DEPTH = 8
_MOST = 16 << 20  # bytes of a packet that is inflated or put together
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
_DECLARED = re.compile(r"""xmlns:([\w.-]{1,64})\s*=\s*["']([^"'<]{1,256})["']""")
_LOOSE = re.compile(
    r"""([\w.-]{1,64}):([\w.-]{1,64})\s*(?:=\s*["']([^"'<]{0,256})["']|>([^<]{1,256})</)"""
)


@dataclass(frozen=True)
class Xmp:
    """What the packets of a file say.

    Attributes:
        values: texts of each property; several of an array.
        damaged: whether a packet is not well-formed.
    """

    values: dict[Name, tuple[str, ...]] = field(default_factory=dict)
    damaged: bool = False

    def text(self, namespace: str, name: str) -> str | None:
        """The first text of a property; ``None`` without one."""
        found = self.values.get((namespace, name))
        return found[0] if found else None


def read_xmp(metadata: Iterable[tuple[str, bytes]]) -> Xmp:
    """Read all XMP packets among a file's metadata blocks; nothing in them can raise."""
    values: dict[Name, tuple[str, ...]] = {}
    damaged = False
    for packet in _packets(metadata):
        text = decoded(packet)
        root = parsed(text)
        damaged |= root is None
        for name, found in (_loose(text) if root is None else _properties(root)).items():
            values.setdefault(name, found)
    return Xmp(values, damaged)


def xmp_packet(metadata: Iterable[tuple[str, bytes]]) -> bytes:
    """The XMP of a file as one packet in UTF-8; as it is where it is that already."""
    packets = _packets(metadata)
    if not packets:
        return b""
    first = packets[0].rstrip(b"\0")
    texts = [decoded(packet) for packet in packets]
    roots = [parsed(text) for text in texts]
    main = None if roots[0] is None else roots[0].find(f".//{_RDF}RDF")
    others = [root for root in roots[1:] if root is not None]
    if main is None or not others:
        return first if _encoding(first)[1] == "utf-8" else texts[0].encode("utf-8", "replace")
    for prefix, uri in _DECLARED.findall("".join(texts)):
        if not re.fullmatch(r"ns\d+|xml", prefix):
            ElementTree.register_namespace(prefix, uri)
    for root in others:
        main.extend(root.iterfind(f".//{_RDF}RDF/*"))
    for description in main:
        description.attrib.pop(_HAS_EXTENDED, None)
    assert roots[0] is not None
    return ElementTree.tostring(roots[0], "utf-8")


def decoded(packet: bytes) -> str:
    """The text of a packet, in whatever encoding, from its first tag on."""
    bom, encoding = _encoding(packet)
    text = packet[len(bom) :].decode(encoding, "replace")
    return text[max(text.find("<"), 0) :]


def _encoding(packet: bytes) -> tuple[bytes, str]:
    """The mark in front of a packet, which is no part of it, and its encoding."""
    for start, encoding in _BOMS:
        if packet.startswith(start):
            return (b"" if b"<" in start else start), encoding
    return b"", "utf-8"


def _packets(metadata: Iterable[tuple[str, bytes]]) -> list[bytes]:
    """The packets of a file, those in parts put together, in the file's order."""
    found: list[bytes] = []
    parts: dict[bytes, dict[int, bytes]] = {}
    for name, payload in metadata:
        if name == "APP1" and payload.startswith(XMP_PREFIX):
            found.append(payload[len(XMP_PREFIX) :])
        elif name == "APP1" and payload.startswith(EXTENDED_PREFIX):
            head = payload[len(EXTENDED_PREFIX) :]
            offset = int.from_bytes(head[_GUID + 4 : _GUID + _NUMBERS], "big")
            parts.setdefault(head[:_GUID], {})[offset] = head[_GUID + _NUMBERS :]
        elif name == "XMP":
            found.append(payload)
        elif name == "iTXt" and payload.startswith(_ITXT):
            found.append(_of_itxt(payload))
    for pieces in parts.values():
        found.append(b"".join(pieces[offset] for offset in sorted(pieces))[:_MOST])
    return [packet for packet in found if packet]


def _of_itxt(payload: bytes) -> bytes:
    """The text of a PNG's iTXt chunk: flag and method, language and keyword, then itself."""
    flags, rest = payload[len(_ITXT) : len(_ITXT) + 2], payload[len(_ITXT) + 2 :]
    text = rest.split(b"\0", 2)[-1]
    if flags[:1] != b"\1":
        return text
    try:
        return zlib.decompressobj().decompress(text, _MOST)
    except zlib.error:
        return b""


def parsed(text: str) -> ElementTree.Element | None:
    """The root of an XML document of anybody's; None where it is damaged or defines entities."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        return None
    try:
        return ElementTree.fromstring(text[: text.rfind(">") + 1])
    except (ElementTree.ParseError, ValueError, RecursionError):
        return None


def _properties(root: ElementTree.Element) -> dict[Name, tuple[str, ...]]:
    values: dict[Name, tuple[str, ...]] = {}
    for description in root.iter(f"{_RDF}Description"):
        _collect(description, "", values, _DEPTH)
    return values


def _collect(
    node: ElementTree.Element, above: str, values: dict[Name, tuple[str, ...]], depth: int
) -> None:
    """Put a node's properties into `values`, structures' parts by their path."""
    for name, text in node.attrib.items():
        if not name.startswith(_RDF):
            _put(name, above, (text,), values)
    for child in node:
        inner = [part for part in child if part.tag in (f"{_RDF}Description", *_ARRAYS)]
        path = f"{above}{_split(child.tag)[1]}/"
        if inner and inner[0].tag in _ARRAYS:
            texts = tuple((item.text or "").strip() for item in inner[0])
            _put(child.tag, above, texts, values)
        elif not len(child):
            _put(child.tag, above, ((child.text or "").strip(),), values)
        if depth and (inner or len(child)):
            _collect(inner[0] if inner else child, path, values, depth - 1)
        elif depth and child.attrib:
            _collect(child, path, values, depth - 1)


def _put(tag: str, above: str, texts: tuple[str, ...], values: dict[Name, tuple[str, ...]]) -> None:
    namespace, name = _split(tag)
    if texts and (texts[0] or len(texts) > 1):
        values.setdefault((namespace, above + name), texts)


def _split(tag: str) -> Name:
    namespace, _, name = tag.rpartition("}")
    return namespace.lstrip("{").rstrip("/#"), name


def _loose(text: str) -> dict[Name, tuple[str, ...]]:
    """Properties of a packet that is no XML: attributes and elements with a plain text."""
    namespaces = dict(_DECLARED.findall(text))
    values: dict[Name, tuple[str, ...]] = {}
    for prefix, name, attribute, element in _LOOSE.findall(text):
        # a prefix whose declaration is lost stands for itself
        namespace = namespaces.get(prefix, prefix)
        _put(f"{{{namespace}}}{name}", "", (attribute or element,), values)
    return values
