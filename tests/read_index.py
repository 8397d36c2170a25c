#!/usr/bin/env python3
"""A second reader of index files, written from docs/index-format.md alone: it shares no line with tarblk, so what the two
agree on is what the page says.

    read_index.py INDEX BLOB [TAR]

checks the index against the layer, byte by byte, and prints its entries as `tarblk ls --json` does. TAR is the
decompressed BLOB, needed if BLOB is compressed. Whatever is not as the page says ends it with an error."""

import base64
import ctypes
import hashlib
import json
import struct
import subprocess
import sys
import tempfile

MAGIC = bytes.fromhex("89 74 62 69 0d 0a 1a 0a")
BLOCK = 512
CHUNK = 32768
SUMMARY, ENTRIES, LAYER, CHUNKS, SPANS, DIRECTORY, IN_IMAGE, BLOCKS = 1, 2, 3, 4, 5, 6, 8, 9
WINDOWS, PAYLOADS, HEADERS, BLOCK_WINDOWS, CONTENT_PIECES = 16, 17, 18, 19, 20
FILE, DIR, SYMLINK, HARDLINK, CHAR, BLOCKDEV, FIFO = range(7)
KINDS = ["file", "directory", "symlink", "hardlink", "char", "block", "fifo"]
PLACED, SPARSE, ATTRIBUTES = 8, 16, 32


def wrapped(number):
    """A 64-bit number as two's complement."""
    return number - (1 << 64) if number >> 63 else number


def need(truth, what):
    if not truth:
        sys.exit(f"not as the page says: {what}")


def crc32c(data, table=[]):
    if not table:
        for n in range(256):
            for _ in range(8):
                n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
            table.append(n)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def short(data):
    return hashlib.sha256(data).digest()[:20]


def zstd(frame):
    return subprocess.run(["zstd", "-dcq"], input=frame, stdout=subprocess.PIPE, check=True).stdout


class Bytes:
    """Bytes that are taken from the front."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        need(self.at + count <= len(self.data), "bytes are missing")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            need(value < 1 << 64 and shift <= 70, "a varint has at most 64 bits")
            if byte < 0x80:
                return value

    def signed(self):
        value = self.varint()
        return value // 2 if value % 2 == 0 else -(value // 2) - 1

    def end(self, what):
        need(self.at == len(self.data), f"{what} has bytes left")


class IndexFile:
    def __init__(self, data):
        self.data = data
        need(data[:8] == MAGIC, "magic")
        version, count, checksum, self.hot_len = struct.unpack_from("<HHIQ", data, 8)
        need(version == 1 and count <= 64 and self.hot_len <= 1 << 30, "version and counts")
        need(checksum == crc32c(data[:12] + data[16 : 24 + 40 * count]), "the table's checksum")
        self.raw, self.encodings, at, hot_end = {}, {}, 24 + 40 * count, None
        kinds = []
        for number in range(count):
            kind, flags, encoding, offset, length, decoded, crc, zero = struct.unpack_from(
                "<IHHQQQII", data, 24 + 40 * number
            )
            need(offset == at and zero == 0 and flags & ~3 == 0, "sections are back to back")
            at += length
            cold = bool(flags & 2)
            need(hot_end is None or cold, "hot sections come first")
            if cold and hot_end is None:
                hot_end = offset
            section = data[offset:at]
            need(crc32c(section) == crc, f"checksum of section {kind}")
            self.raw[kind] = section
            if encoding == 1:
                section = zstd(section)
            if encoding < 2:
                need(len(section) == decoded, f"decoded length of section {kind}")
            self.encodings[kind] = (encoding, decoded)
            if encoding == 1:
                self.raw[kind] = section
            kinds.append(kind)
        need(kinds == sorted(set(kinds)), "kinds ascend")
        need(at == len(data) and (hot_end or at) == self.hot_len, "the sections fill the file")

    def summary(self):
        section = self.raw[SUMMARY]
        need(len(section) >= 12 * 8 + 32, "the summary's length")
        need(hashlib.sha256(self.raw[ENTRIES]).digest() == section[96:128], "the digest of the entries")
        return struct.unpack_from("<12Q", section)

    def layer(self):
        section = Bytes(self.raw[LAYER])
        compression, length = section.varint(), section.varint()
        digests = []
        for _ in range(2):
            size = section.varint()
            need(size <= 512, "a digest's length")
            digests.append(section.take(size).decode())
        return compression, length, digests[0], digests[1], section.varint()

    def pieces(self):
        """The pieces of the cold sections, checked by the cold directory: kind -> list of bytes as they are in the file."""
        cold = {}
        if DIRECTORY not in self.raw:
            need(not any(kind >= WINDOWS for kind in self.raw), "cold sections have a directory")
            return cold
        directory = Bytes(self.raw[DIRECTORY])
        for _ in range(directory.varint()):
            kind, count = directory.varint(), directory.varint()
            lengths = [directory.varint() for _ in range(count)]
            section, cold[kind] = Bytes(self.raw[kind]), []
            for length in lengths:
                piece = section.take(length)
                if length:
                    crc, digest = struct.unpack("<I20s", directory.take(24))
                    need(crc == crc32c(piece) and digest == short(piece), f"a piece of section {kind}")
                cold[kind].append(piece)
            section.end(f"section {kind}")
        directory.end("the cold directory")
        need(list(cold) == [kind for kind in sorted(self.raw) if kind >= WINDOWS], "the directory has all cold sections")
        return cold

    def decoded(self, kind, pieces):
        encoding, length = self.encodings[kind]
        if encoding == 0:
            return pieces
        need(encoding == 2, f"the encoding of section {kind}")
        pieces = [zstd(piece) if piece else b"" for piece in pieces]
        need(sum(map(len, pieces)) == length, f"decoded length of section {kind}")
        return pieces

    def in_image(self):
        """What is read otherwise in images: number of the entry -> field -> value."""
        others, number = {}, -1
        if IN_IMAGE not in self.raw:
            return others
        section = Bytes(self.raw[IN_IMAGE])
        while further := section.varint():
            number += further
            fields = section.varint()
            need(0 < fields < 64, "fields of what is read otherwise")
            other = others[number] = {}
            for bit, key in [(1, "path"), (2, "link")]:
                if fields & bit:
                    size = section.varint()
                    need(size <= 1 << 20, "a name that is read otherwise")
                    other[key] = section.take(size).decode(errors="replace")
            for bit, key in [(4, "uid"), (8, "gid")]:
                if fields & bit:
                    other[key] = wrapped(section.varint())
            if fields & 16:
                other["mtime"], other["mtime_nanos"] = section.signed(), section.varint()
            if fields & 32:
                other["refused_type"] = section.varint()
        section.end("what is read otherwise")
        return others

    def entries(self):
        section = Bytes(self.raw[ENTRIES])
        owners, sets, set_weight = [], [], 0
        times, last_new = [(0, 0)] * 32, 0
        name = link = b""
        expected = 0
        while count := section.varint():
            need(count <= 2048, "a batch's length")
            lengths = [section.varint() for _ in range(11)]
            need(sum(lengths) <= 64 << 20, "a batch's bytes")
            columns = [Bytes(section.take(length)) for length in lengths]
            tags, owner, new_owners, shared, fresh, names, time, new_times, sizes, links, rare = columns
            for _ in range(count):
                tag = tags.take(1)[0]
                kind = tag & 7
                need(kind <= FIFO and tag < 64, "a tag")
                number = owner.varint()
                if number == len(owners):
                    mine = (new_owners.varint(), wrapped(new_owners.varint()), wrapped(new_owners.varint()))
                    if len(owners) < 65536:
                        owners.append(mine)
                else:
                    mine = owners[number]
                kept = shared.varint()
                need(kept <= len(name), "a name's shared bytes")
                name = name[:kept] + names.take(fresh.varint())
                place = time.varint()
                if place == 32:
                    seconds = (new_times.signed() + last_new + (1 << 63)) % (1 << 64) - (1 << 63)
                    last_new = seconds
                    now = (seconds, new_times.varint())
                    times.pop()
                else:
                    now = times.pop(place)
                times.insert(0, now)
                size = sizes.varint() if kind == FILE else 0
                if kind in (SYMLINK, HARDLINK):
                    kept = links.varint()
                    need(kept <= len(link), "a link's shared bytes")
                    link = link[:kept] + links.take(links.varint())
                start, blocks = expected, 1
                if tag & PLACED:
                    start, blocks = expected + rare.varint(), rare.varint()
                device = (rare.varint(), rare.varint()) if kind in (CHAR, BLOCKDEV) else None
                attributes = []
                if tag & ATTRIBUTES:
                    number = rare.varint()
                    if number == len(sets):
                        for _ in range(rare.varint()):
                            key = rare.take(rare.varint())
                            attributes.append((key, rare.take(rare.varint())))
                        need(attributes and attributes == sorted(set(attributes)), "attributes ascend")
                        weight = sum(64 + len(key) + len(value) for key, value in attributes)
                        if len(sets) < 4096 and set_weight + weight <= 4 << 20:
                            sets.append(attributes)
                            set_weight += weight
                    else:
                        attributes = sets[number]
                at, in_file, segments = (start + blocks) * BLOCK, 0, []
                if tag & SPARSE:
                    for _ in range(rare.varint()):
                        in_file += rare.varint()
                        length = rare.varint()
                        segments.append((in_file, at, length))
                        in_file, at = in_file + length, at + length
                        need(length > 0 and in_file <= size, "a segment ends within the file")
                elif size:
                    segments.append((0, at, size))
                    at += size
                expected = -(-at // BLOCK)
                yield {
                    "path": name,
                    "kind": kind,
                    "owner": mine,
                    "time": now,
                    "size": size,
                    "link": link,
                    "device": device,
                    "xattrs": attributes,
                    "headers": (start * BLOCK, blocks * BLOCK),
                    "segments": segments,
                }
            for column in columns:
                column.end("a column")
        section.end("the entries")


class ZStream(ctypes.Structure):
    """zlib's z_stream: Python's own zlib has no inflatePrime."""

    _fields_ = [
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    ]


def inflate(blob, wbits, bits, window, length):
    """The first `length` bytes at most that come out of `blob`, and whether a member ended."""
    zlib, stream = ctypes.CDLL("libz.so.1"), ZStream()
    need(zlib.inflateInit2_(ctypes.byref(stream), wbits, b"1.2.11", ctypes.sizeof(stream)) == 0, "zlib works")
    if bits:
        # The lowest bits of the first byte belong to what comes before.
        zlib.inflatePrime(ctypes.byref(stream), 8 - bits, blob[0] >> bits)
        blob = blob[1:]
    if window:
        zlib.inflateSetDictionary(ctypes.byref(stream), window, len(window))
    source, target = ctypes.create_string_buffer(blob, len(blob)), ctypes.create_string_buffer(length)
    stream.next_in, stream.avail_in = ctypes.addressof(source), len(blob)
    stream.next_out, stream.avail_out = ctypes.addressof(target), length
    outcome = zlib.inflate(ctypes.byref(stream), 2)
    need(outcome in (0, 1, -5), f"deflate: {outcome}")
    zlib.inflateEnd(ctypes.byref(stream))
    return target.raw[: stream.total_out]


def counts(log, each):
    """How often each symbol occurs in a predefined table, written as a table's description."""
    bits, have, left, threshold = log - 5, 4, (1 << log) + 1, 1 << log
    width = log + 1
    for count in each:
        short, value = 2 * threshold - 1 - left, count + 1
        left -= abs(count)
        bits |= (value + short if value >= threshold else value) << have
        have += width - 1 if value < short else width
        while left < threshold and threshold > 1:
            width, threshold = width - 1, threshold >> 1
    return bits.to_bytes((have + 7) // 8, "little")


PREDEFINED = [
    None,
    counts(5, [1] * 6 + [2] * 3 + [1] * 15 + [-1] * 5),
    counts(6, [1, 4, 3] + [2] * 6 + [1] * 37 + [-1] * 7),
    counts(6, [4, 3] + [2] * 11 + [1] * 3 + [2] * 9 + [3, 2] + [1] * 5 + [-1] * 4),
]


def from_block(blob, at, stop, entry, piece, window_len):
    """What comes out of the blocks of a zstd frame from one on, up to the frame's end or to byte `stop` of the blob."""
    descriptor, flags, repeats, tables = entry
    dictionary = bytes.fromhex("37a430ec01000000")
    for kind, table in enumerate(tables):
        if kind == 0:
            dictionary += table or bytes.fromhex("8010")
        else:
            dictionary += table or PREDEFINED[kind]
    dictionary += struct.pack("<III", *repeats)
    content = bytearray(window_len)
    if piece:
        section = Bytes(piece)
        extents, place = [], 0
        for _ in range(section.varint()):
            place += section.varint()
            length = section.varint()
            extents.append((place, length))
            place += length
        for place, length in extents:
            content[place : place + length] = section.take(length)
        section.end("a piece of a window")
        need(len(content) == window_len, "the extents fit the window")
    dictionary += bytes(max(0, 8 - window_len, max(repeats) - window_len)) + bytes(content)
    # The blocks, and where they end.
    end, last = at, 0
    while end < stop and not last:
        header = int.from_bytes(blob[end : end + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        end += 3 + (1 if kind == 1 else size)
    frame = bytes.fromhex("28b52ffd00") + bytes([descriptor]) + blob[at:end]
    if not last:
        need(end == stop, "a span ends with a block")
        frame += b"\x01\0\0"
    with tempfile.NamedTemporaryFile() as file:
        file.write(dictionary)
        file.flush()
        command = ["zstd", "-dcq", "-D", file.name]
        came = subprocess.run(command, input=frame, stdout=subprocess.PIPE, check=True).stdout
    return came, end + (4 if last and flags & 1 else 0)


def check_blocks(index, blob, tar, frames, pieces):
    """The spans that begin at blocks: what comes out of each. `frames` are those that do not."""
    need(CHUNKS in index.raw, "blocks are told only where digests are")
    section = Bytes(index.raw[BLOCKS])
    spans, in_tar, in_blob = [(start, at, None, 0) for start, at in frames], 0, 0
    for _ in range(section.varint()):
        in_tar, in_blob = in_tar + section.varint(), in_blob + section.varint()
        how, entry, window_len = section.take(1)[0], None, 0
        need(how < 2, "how a block is entered")
        if how:
            window_len = section.varint()
            descriptor, flags = section.take(2)
            repeats = [section.varint() for _ in range(3)]
            tables = [section.take(section.varint()) if flags & 2 << kind else None for kind in range(4)]
            entry = (descriptor, flags, repeats, tables)
            need(flags < 32 and all(repeats), "what a decoder holds")
        spans.append((in_tar, in_blob, entry, window_len))
    section.end("the blocks")
    spans.sort(key=lambda span: span[:2])
    ends = spans[1:] + [(len(tar), len(blob), None, 0)]
    need(all(a[0] < b[0] and a[1] < b[1] for a, b in zip(spans, ends)), "spans are in order")
    need(len(pieces) <= len(spans), "a window for each span")
    pieces += [b""] * (len(spans) - len(pieces))
    for (start, at, entry, window_len), piece, end in zip(spans, pieces, ends):
        need(bool(window_len) == bool(piece) and window_len <= min(start, 32 << 20), "a window's reach")
        if entry:
            came, stopped = from_block(blob, at, end[1], entry, piece, window_len)
            need(came == tar[start : start + len(came)], f"what comes out of the block at {at}")
            # Behind a frame others may follow that are no spans of their own.
            need(start + len(came) == end[0] or stopped < end[1], f"how much comes out of the block at {at}")


def check_spans(index, blob, tar, windows, pieces):
    section = Bytes(index.raw[SPANS])
    compression = section.take(1)[0]
    need(compression == index.layer()[0], "spans and layer name the same compression")
    need((section.varint(), section.varint()) == (len(blob), len(tar)), "spans are of this layer")
    blob_end, count = len(blob) - section.varint(), section.varint()
    spans, in_tar, in_blob = [], 0, 0
    for _ in range(count):
        in_tar, in_blob = in_tar + section.varint(), in_blob + section.varint()
        how = section.varint()
        spans.append((in_tar, in_blob, how // 16, how // 8 % 2, how % 8))
    section.end("the spans")
    need(not spans or spans[0][0] == 0 and blob_end <= len(blob), "the first span begins the tar")
    need(not windows or len(windows) == len(spans), "a window for each span")
    for number, (start, at, window_len, block, bits) in enumerate(spans):
        end = spans[number + 1][0] if number + 1 < len(spans) else len(tar)
        stop = spans[number + 1][1] + 1 if number + 1 < len(spans) else blob_end
        window = windows[number] if windows else b""
        need(len(window) == window_len <= CHUNK, "a window's length")
        need(block or window_len == bits == 0, "members and frames need no history")
        if compression == 1:
            came = inflate(blob[at:stop], -15 if block else 31, bits, window, end - start)
        else:
            # A frame begins here; others may follow in the span.
            need(not block, "zstd has no deflate blocks")
            came = zstd(blob[at : spans[number + 1][1] if number + 1 < len(spans) else blob_end])
        # At the end of a gzip member decoding goes on with the next one's header, which this reader leaves to others.
        need(came and came == tar[start : start + len(came)], f"what comes out of span {number}")
        need(compression == 1 or start + len(came) == end, f"how much comes out of span {number}")
    if BLOCKS in index.raw:
        need(compression == 2, "blocks are those of zstd frames")
        check_blocks(index, blob, tar, [span[:2] for span in spans], pieces)
    return spans


def check(index, blob, tar):
    """Holds everything that the index says against the layer; returns the entries."""
    summary, layer = index.summary(), index.layer()
    entries = list(index.entries())
    others = index.in_image()
    need(all(number < len(entries) for number in others), "what is read otherwise is of entries")
    for number, other in others.items():
        entries[number]["in_image"] = other
    gaps = before = 0
    for entry in entries:
        gaps = max(gaps, entry["headers"][0] - before)
        at, length = entry["headers"]
        before = -(-(at + length + sum(part[2] for part in entry["segments"])) // BLOCK) * BLOCK
    need((IN_IMAGE in index.raw) == bool(others or gaps >= 1024), "the table of what is read otherwise is there")
    need(layer[1] == len(blob) and summary[0] == len(tar), "lengths of blob and tar")
    need((layer[0] == 0) == (blob == tar), "compression")
    for named, data in [(layer[2], blob), (layer[3], tar)]:
        need(named in ("", "sha256:" + hashlib.sha256(data).hexdigest()), "digest of blob or tar")
    payload = [segment for entry in entries for segment in entry["segments"]]
    stored = sum(length for _, _, length in payload)
    kinds = [entry["kind"] for entry in entries]
    counts = [kinds.count(kind) for kind in (FILE, DIR, SYMLINK, HARDLINK)]
    need(summary[1:6] == (len(entries), *counts), "counts of kinds")
    need(summary[6:8] == (kinds.count(CHAR) + kinds.count(BLOCKDEV), kinds.count(FIFO)), "counts of kinds")
    read = sum(entry["size"] for entry in entries)
    headers = sum(entry["headers"][1] for entry in entries)
    need(summary[8:11] == (stored, read, headers), "sums of bytes")
    if CHUNKS in index.raw:
        section = Bytes(index.raw[CHUNKS])
        need(struct.unpack("<II", section.take(8)) == (CHUNK, 20), "chunks and digests")
        for at in range(0, len(tar), CHUNK):
            need(section.take(20) == short(tar[at : at + CHUNK]), f"the chunk at {at}")
        section.end("chunk digests")
    cold = index.pieces()
    need(not layer[0] or SPANS in index.raw, "a compressed layer has spans")
    if SPANS in index.raw:
        windows = index.decoded(WINDOWS, cold[WINDOWS]) if WINDOWS in cold else []
        pieces = index.decoded(BLOCK_WINDOWS, cold[BLOCK_WINDOWS]) if BLOCK_WINDOWS in cold else []
        check_spans(index, blob, tar, windows, pieces)
    if PAYLOADS in cold:
        need(all(len(piece) == 65536 for piece in cold[PAYLOADS][:-1]), "pieces of payload digests")
        digests = Bytes(b"".join(cold[PAYLOADS]))
        for entry in entries:
            content = b"".join(tar[at : at + length] for _, at, length in entry["segments"])
            if content:
                need(digests.take(32) == hashlib.sha256(content).digest(), "a payload digest")
        digests.end("payload digests")
    if CONTENT_PIECES in cold:
        need(all(len(piece) == 65520 for piece in cold[CONTENT_PIECES][:-1]), "pieces of content pieces")
        records = Bytes(b"".join(cold[CONTENT_PIECES]))
        for entry in entries:
            content = b"".join(tar[at : at + length] for _, at, length in entry["segments"])
            begin = 0
            while len(content) > 1 << 20 and begin < len(content):
                length = struct.unpack("<I", records.take(4))[0]
                end = begin + length
                need(0 < length <= 1 << 18 and end <= len(content), "the length of a content piece")
                need(length >= 1 << 14 or end == len(content), "a content piece is too short")
                need(records.take(20) == short(content[begin:end]), "the digest of a content piece")
                begin = end
        records.end("content pieces")
    if HEADERS in cold:
        pieces = index.decoded(HEADERS, cold[HEADERS])
        need(all(len(piece) == 1 << 20 for piece in pieces[:-1]), "pieces of header bytes")
        rest, rebuilt, at = Bytes(b"".join(pieces)), [], 0
        for _, start, length in payload:
            rebuilt += [rest.take(start - at), tar[start : start + length]]
            at = start + length
        rebuilt.append(rest.take(len(tar) - at))
        rest.end("header bytes")
        need(b"".join(rebuilt) == tar, "the tar comes back")
    return entries


def line(entry):
    """An entry as `tarblk ls --json` prints it."""
    mode, uid, gid = entry["owner"]
    said = {"path": entry["path"].decode(errors="replace"), "type": KINDS[entry["kind"]], "mode": f"{mode:04o}"}
    said |= {"uid": uid, "gid": gid, "mtime": entry["time"][0], "mtime_nanos": entry["time"][1]}
    if entry["kind"] == FILE:
        said["size"] = entry["size"]
    if entry["kind"] in (SYMLINK, HARDLINK):
        said["link"] = entry["link"].decode(errors="replace")
    for key, text in [("path", entry["path"]), ("link", entry["link"])]:
        try:
            text.decode()
        except UnicodeDecodeError:
            if key in said:
                said[f"{key}_base64"] = base64.b64encode(text).decode()
    if entry["device"]:
        said["device"] = entry["device"]
    if entry["xattrs"]:
        values = [(key.decode(errors="replace"), base64.b64encode(value).decode()) for key, value in entry["xattrs"]]
        said["xattrs"] = dict(values)
    said["headers"] = entry["headers"]
    if entry["segments"]:
        said["segments"] = entry["segments"]
    if "in_image" in entry:
        said["in_image"] = entry["in_image"]
    return json.dumps(said)


def main():
    index, blob, *rest = [open(path, "rb").read() for path in sys.argv[1:]]
    tar = rest[0] if rest else blob
    for entry in check(IndexFile(index), blob, tar):
        print(line(entry))


if __name__ == "__main__":
    main()
