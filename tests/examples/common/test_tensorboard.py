"""Event files are read back by a reader of the format that shares no code with the writer."""

import struct

import pytest

from examples.common.tensorboard import ScalarWriter, checksum


def records(path):
    """The data of each record; checksums are taken by a table."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12])[0] == masked(content[:8])
        data, content = content[12 : 12 + length], content[12 + length :]
        assert struct.unpack("<I", content[:4])[0] == masked(data)
        yield data
        content = content[4:]


def masked(data):
    table = []
    for value in range(256):
        for _ in range(8):
            value = value // 2 ^ 0x82F63B78 if value % 2 else value // 2
        table.append(value)
    crc = 2**32 - 1
    for byte in data:
        crc = table[(crc ^ byte) % 256] ^ crc // 256
    crc ^= 2**32 - 1
    return ((crc // 2**15 | crc * 2**17) + 0xA282EAD8) % 2**32


def fields(data):
    """The fields of a message: number and value."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        kind = key % 8
        if kind == 0:
            yield key // 8, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield key // 8, data[place : place + size]
        place += size


def test_numbers_are_read_back(tmp_path):
    for run in range(2):
        with ScalarWriter(tmp_path / "new") as writer:
            writer.add({"loss": 0.5, "dice_ä": 75.25 + run}, step=300)
            writer.add({"loss": -1e-3}, step=2**40)
    first, second = sorted((tmp_path / "new").glob("events.out.tfevents.*"))
    version, *events = [dict(fields(data)) for data in records(second)]
    assert version[3] == b"brain.Event:2"
    found = []
    for event in events:
        assert 1e9 < struct.unpack("<d", event[1])[0] < 1e11
        for number, value in fields(event[5]):
            assert number == 1
            scalar = dict(fields(value))
            found.append((event[2], scalar[1].decode(), struct.unpack("<f", scalar[2])[0]))
    expected = [(300, "loss", 0.5), (300, "dice_ä", 76.25), (2**40, "loss", -1e-3)]
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    assert [each[2] for each in found] == pytest.approx([each[2] for each in expected])
    assert first.read_bytes() != second.read_bytes()


def test_checksum_of_the_standard():
    assert checksum(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert checksum(bytes(range(32))) == 0x46DD794E
