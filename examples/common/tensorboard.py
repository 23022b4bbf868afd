"""Curves for TensorBoard, written without it.

An event file is a sequence of records (`tensorflow/core/lib/io/record_writer.h`), each of which
holds an `Event` (`tensorflow/core/util/event.proto`) in protocol buffers' encoding. Of both only
what numbers need is here.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

VERSION = b"brain.Event:2"


class ScalarWriter:
    """A context that writes numbers by step to a new event file, for `tensorboard --logdir`.

    Files of earlier runs in the same folder stay; TensorBoard joins them.

    Args:
        directory: where the file goes; made if missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ScalarWriter(Path(folder)) as writer:
        ...         writer.add({"loss": 0.5}, step=1)
        ...     print(len(list(Path(folder).glob("events.out.tfevents.*"))))
        1
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}"
        self._file = (directory / name).open("xb")
        self._write(_event(_bytes(3, VERSION)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers of one step, by their tags."""
        scalars = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + struct.pack("<Bf", 2 << 3 | 5, value))
            for tag, value in values.items()
        )
        self._write(_event(_key(2, 0) + _varint(step) + _bytes(5, scalars)))
        self._file.flush()

    def _write(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_checksum(part)) for part in (length, data))
        first, second = checks
        self._file.write(length + first + data + second)

    def __enter__(self) -> "ScalarWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def masked_checksum(data: bytes) -> int:
    """CRC-32C, rotated and shifted so that the checksum of a record with checksums is a good one.

    Example:
        >>> hex(checksum(b"123456789"))
        '0xe3069283'
    """
    crc = checksum(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def checksum(data: bytes) -> int:
    """CRC-32C (Castagnoli), https://www.rfc-editor.org/rfc/rfc3720#appendix-B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _event(content: bytes) -> bytes:
    return struct.pack("<Bd", 1 << 3 | 1, time.time()) + content


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
