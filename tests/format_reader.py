#!/usr/bin/env python3
"""Reads a point out of a replica's store with nothing but the two descriptions of the format:
blkfilter/changelog/FORMAT.md and target/src/store/FORMAT.md. It shares no code with the product
and proves that the descriptions are enough; slow, and meant for small volumes.

    format_reader.py FOLDER list
    format_reader.py FOLDER newest|NAME|lsn:E.S IMAGE

Needs Python and the program `zstd`.
"""

import os
import struct
import subprocess
import sys

BLOCK = 4096
# More than the longest batch.
LONGEST = 4 << 20
CATCH_UP, ORDERED = 0, 1


def crc_table():
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


CRC_TABLE = list(crc_table())


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
      0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
LANES = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
         (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8


def rounds(v, words, mask):
    """The seven rounds; of one block, or of many at once in lanes of 64 bits."""
    for turn in range(7):
        for n, (a, b, c, d) in enumerate(LANES):
            for word, r1, r2 in ((words[2 * n], 16, 12), (words[2 * n + 1], 8, 7)):
                v[a] = v[a] + v[b] + word & mask
                x = v[d] ^ v[a]
                v[d] = (x >> r1 | x << 32 - r1) & mask
                v[c] = v[c] + v[d] & mask
                x = v[b] ^ v[c]
                v[b] = (x >> r2 | x << 32 - r2) & mask
        words = [words[n] for n in PERMUTATION]
    return [v[n] ^ v[n + 8] for n in range(8)]


def compress(chain, words, counter, length, flags):
    v = [*chain, *IV[:4], counter & 0xFFFFFFFF, counter >> 32, length, flags]
    return rounds(v, words, 0xFFFFFFFF)


def chunk(piece, counter, flags):
    """Chaining value of one chunk; `flags` is ROOT or nothing."""
    chain = IV
    blocks = [piece[n:n + 64] for n in range(0, len(piece), 64)] or [b""]
    for n, block in enumerate(blocks):
        kind = CHUNK_START if n == 0 else 0
        if n == len(blocks) - 1:
            kind |= CHUNK_END | flags
        words = struct.unpack("<16I", block.ljust(64, b"\0"))
        chain = compress(chain, words, counter, len(block), kind)
    return chain


def full_chunks(data, count):
    """Chaining values of the first `count` chunks, all of 1024 bytes, side by side."""
    def spread(values):
        return int.from_bytes(struct.pack(f"<{count}Q", *values), "little")

    same = spread([1] * count)
    mask = same * 0xFFFFFFFF
    words = struct.unpack_from(f"<{256 * count}I", data)
    chain, counters = [same * word for word in IV], spread(range(count))
    for block in range(16):
        kind = {0: CHUNK_START, 15: CHUNK_END}.get(block, 0)
        v = chain + [same * word for word in IV[:4]] + [counters, 0, same * 64, same * kind]
        chain = rounds(v, [spread(words[16 * block + n::256]) for n in range(16)], mask)
    columns = [struct.unpack(f"<{count}Q", word.to_bytes(8 * count, "little")) for word in chain]
    return [list(row) for row in zip(*columns)]


def blake3(data):
    def tree(chains, root):
        if len(chains) == 1:
            return chains[0]
        left = 1 << (len(chains) - 1).bit_length() - 1
        words = tree(chains[:left], 0) + tree(chains[left:], 0)
        return compress(IV, words, 0, 64, PARENT | root)

    full = len(data) // 1024
    if len(data) <= 1024:
        chains = [chunk(data, 0, ROOT)]
    else:
        chains = full_chunks(data, full)
        if len(data) % 1024:
            chains.append(chunk(data[1024 * full:], full, 0))
    return struct.pack("<8I", *tree(chains, ROOT))


class Wrong(Exception):
    """A check of the format failed."""


def require(right, what):
    if not right:
        raise Wrong(what)


def u16(data, at):
    return struct.unpack_from("<H", data, at)[0]


def u32(data, at):
    return struct.unpack_from("<I", data, at)[0]


def u64(data, at):
    return struct.unpack_from("<Q", data, at)[0]


def place(data, at):
    return (u64(data, at), u64(data, at + 8))


def good_block(data, magic, versions=(1,)):
    return (len(data) == BLOCK and data[:8] == magic and u16(data, 8) in versions
            and crc32c(data[:4092]) == u32(data, 4092))


def read_super(folder):
    with open(os.path.join(folder, "super"), "rb") as file:
        data = file.read(4 * BLOCK)
    copies = [data[n * BLOCK:(n + 1) * BLOCK] for n in range(4)]
    good = [good_block(copy, b"FARSHSUP", (1, 2)) for copy in copies]
    require(good[0] or good[1], "both copies of the even versions are bad")
    require(good[2] or good[3], "both copies of the odd versions are bad")
    newest = max((c for c, g in zip(copies, good) if g), key=lambda c: u64(c, 32))
    count = u64(newest, 136)
    return {
        "volume": newest[16:32], "generation": u64(newest, 40), "order": newest[10],
        "floor": place(newest, 48), "base": place(newest, 64), "size": u64(newest, 80),
        "first_segment": u64(newest, 88), "durable": place(newest, 96),
        "summed": u64(newest, 3344),
        "unknown": [(u64(newest, 144 + 16 * n), u64(newest, 152 + 16 * n)) for n in range(count)],
    }


class Batch:
    """One batch, every check of it made."""

    def __init__(self, data):
        require(len(data) >= 256 and data[:8] == b"FARSHBAT", "no batch begins here")
        require(u16(data, 8) == 1 and crc32c(data[:252]) == u32(data, 252), "batch header")
        require(u32(data, 12) == 0, "batch flags")
        self.volume, self.generation = data[16:32], u64(data, 32)
        self.prev, self.epoch = place(data, 40), u64(data, 56)
        self.last = (self.epoch, u64(data, 72))
        self.durable = place(data, 96)
        self.prev_chain, self.chain = data[168:200], data[200:232]
        records, self.aux_len, frames, stored_len, self.raw_len = struct.unpack_from("<5I", data, 112)
        self.aux_at = 256 + 48 * records
        frames_at = self.aux_at + self.aux_len
        stored_at = frames_at + 16 * frames
        self.len = stored_at + stored_len
        require(self.len <= len(data), "batch is cut off")
        self.data = data = data[:self.len]
        require(blake3(data[:200] + blake3(data[256:])) == self.chain, "chain")
        self.records = [self.record(256 + 48 * n) for n in range(records)]
        self.raw = self.unpack(frames_at, frames, stored_at)

    def record(self, at):
        kind, flags, aux_len, aux_off, seq = struct.unpack_from("<BBHIQ", self.data, at)
        offset, length, raw_off, crc = struct.unpack_from("<QQII", self.data, at + 24)
        aux = self.data[self.aux_at + aux_off:self.aux_at + aux_off + aux_len]
        require(1 <= kind <= 12 and flags < 2 and aux_off + aux_len <= self.aux_len, "record")
        return {"kind": kind, "flag": flags, "at": (self.epoch, seq), "aux": aux,
                "offset": offset, "len": length, "raw_off": raw_off, "crc": crc}

    def unpack(self, frames_at, frames, stored_at):
        pieces, packed = [], b""
        for n in range(frames):
            raw_len, stored_len, crc, codec = struct.unpack_from("<IIIB", self.data, frames_at + 16 * n)
            stored = self.data[stored_at:stored_at + stored_len]
            stored_at += stored_len
            require(crc32c(stored) == crc, "frame checksum")
            pieces.append((raw_len, stored if codec == 0 else None))
            packed += stored if codec == 1 else b""
        # zstd frames one behind the other unpack to their contents one behind the other.
        plain = b""
        if packed:
            done = subprocess.run(["zstd", "-dcq"], input=packed, capture_output=True, check=True)
            plain = done.stdout
        raw = b""
        for raw_len, stored in pieces:
            if stored is None:
                stored, plain = plain[:raw_len], plain[raw_len:]
            require(len(stored) == raw_len, "frame length")
            raw += stored
        require(len(raw) == self.raw_len and not plain, "raw stream")
        return raw

    def payload(self, record):
        data = self.raw[record["raw_off"]:record["raw_off"] + record["len"]]
        require(len(data) == record["len"] and crc32c(data) == record["crc"], "payload")
        return data


def batches(folder, sb):
    """Every batch of the history, in order."""
    names = sorted(n for n in os.listdir(folder) if n.startswith("seg-") and len(n) == 20)
    names = [n for n in names if int(n[4:], 16) >= sb["first_segment"]]
    at = None
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            data = file.read()
        head = data[:BLOCK]
        require(good_block(head, b"FARSHSEG") and head[16:32] == sb["volume"], f"{name}: header")
        begins = (place(head, 56), head[72:104])
        if at is None:
            require(begins[0] <= sb["base"], f"{name}: the journal begins too late")
            # The order at the base comes from the super block; before it nothing can be opened.
            at = begins
        require(begins == at, f"{name} does not follow the segment before it")
        offset = BLOCK
        while offset < len(data):
            try:
                batch = Batch(data[offset:offset + LONGEST])
                follows = (batch.prev, batch.prev_chain) == at
                require(batch.volume == sb["volume"] and follows, "it does not follow")
                require(batch.generation <= sb["generation"], "of a later generation")
            except Wrong:
                break
            yield batch
            at = (batch.last, batch.chain)
            offset += -(-batch.len // BLOCK) * BLOCK
    require(at is None or at[0] >= sb["durable"], "the journal ends before what was durable")


def points(history, sb):
    """(place, name) of every point that can be opened, oldest first, and the last place."""
    # From which place on the history is in which order.
    order = [(sb["base"], sb["order"])]

    def order_at(at):
        return [o for first, o in order if first <= at][-1:] == [ORDERED]

    pending, found, newest = {}, [], sb["base"]
    for batch in history:
        for record in batch.records:
            kind, at, aux = record["kind"], record["at"], record["aux"]
            if kind == 6:
                marker = (at, aux[33:].decode())
                if record["flag"]:
                    found += [marker] if at > sb["base"] and order_at(at) else []
                else:
                    pending[aux[:16]] = marker
            elif kind == 7 and aux in pending:
                marker = pending.pop(aux)
                found += [marker] if at > sb["base"] and order_at(marker[0]) else []
            elif kind == 8:
                pending.pop(aux, None)
            if at <= sb["base"]:
                continue
            now = order[-1][1]
            after = {9: CATCH_UP, 10: ORDERED}.get(kind, now)
            if kind == 12 and not record["flag"]:
                after = CATCH_UP
            if after != now:
                # Order is lost behind the record before, and is there again at its own record.
                begins = (newest[0], newest[1] + 1) if after == CATCH_UP else at
                order.append((max(begins, order[-1][0]), after))
            newest = at
    # A marker whose stretch ended before it is no point after all.
    return [p for p in found if p[0] >= sb["floor"] and order_at(p[0])], newest


def rotten(folder, image, sb):
    """Sectors of the base that do not match their checksum."""
    with open(os.path.join(folder, "base.crc"), "rb") as file:
        sums = file.read()
    sectors = min(sb["summed"], len(image)) // 512
    sums = sums[:4 * sectors].ljust(4 * sectors, b"\0")
    zeroes = bytes(512)
    for n in range(sectors):
        sector = image[512 * n:512 * n + 512]
        wanted = 0 if sector == zeroes else crc32c(sector) ^ 0x30FCEDC0
        if u32(sums, 4 * n) != wanted:
            yield n


def extract(folder, history, sb, upto, out):
    """The volume after every record up to and including `upto`."""
    with open(os.path.join(folder, "base.img"), "rb") as file:
        image = bytearray(file.read(sb["size"]).ljust(sb["size"], b"\0"))
    unknown = {n for start, length in sb["unknown"] for n in range(start // 512, (start + length) // 512)}
    # What a merge was about to replace is replaced by the records below.
    unknown.update(rotten(folder, image, sb))
    for batch in history:
        for record in batch.records:
            if record["at"] > upto:
                continue
            kind, start, length = record["kind"], record["offset"], record["len"]
            sectors = range(start // 512, (start + length) // 512)
            if kind in (1, 4):
                image[start:start + length] = batch.payload(record)
                unknown.difference_update(sectors)
            elif kind == 2:
                image[start:start + length] = bytes(length)
                unknown.difference_update(sectors)
            elif kind == 3:
                unknown.update(sectors)
            elif kind in (11, 12):
                size = u64(record["aux"], 0)
                image = image[:size].ljust(size, b"\0")
                unknown = {n for n in unknown if n < size // 512}
    require(not unknown, f"the content of {len(unknown)} sectors is unknown")
    with open(out, "wb") as file:
        file.write(image)


def main():
    folder, wanted = sys.argv[1], sys.argv[2]
    sb = read_super(folder)
    history = list(batches(folder, sb))
    known, end = points(history, sb)
    if wanted == "list":
        for (epoch, seq), name in known:
            print(f"{epoch}.{seq} {name}")
        return
    if wanted == "newest":
        at = known[-1][0]
    elif wanted.startswith("lsn:"):
        epoch, seq = wanted[4:].split(".")
        at = (int(epoch), int(seq))
    else:
        at = [at for at, name in known if name == wanted][-1]
    require(sb["floor"] <= at <= end, "the moment is not in the journal")
    extract(folder, history, sb, at, sys.argv[3])


if __name__ == "__main__":
    main()
