"""Small fields of the codecs' formats: whole numbers in few bytes, and a reader that never reads past the end."""

from __future__ import annotations

MAX_VARINT_BYTES = 9  # 63 bits: every count fits a signed 64-bit number


class CodecError(ValueError):
    """A tensor that a form cannot hold, or bytes that are no such form: part of a sentence, without a name in it."""


def varint(value: int) -> bytes:
    """Return a whole number as LEB128: seven bits a byte, the low ones first, the top bit set on all but the last.

    Args:
        value: 0 to 2^63 - 1.

    Raises:
        ValueError: A value outside that range.
    """
    if not 0 <= value < 1 << 7 * MAX_VARINT_BYTES:
        raise ValueError(f"A count must be from 0 to 2^63 - 1, got {value}.")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads fields one after the other out of bytes that may be damaged or forged."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0

    def left(self) -> int:
        """Return how many bytes have not been read."""
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> memoryview:
        """Return the next bytes, without a copy.

        Args:
            count: How many, ≥ 0.
            what: Name of the field, for the sentence.

        Raises:
            CodecError: Fewer bytes are left.
        """
        if count > self.left():
            raise CodecError(f"expected {count} bytes of {what}, got {self.left()}")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self, what: str) -> int:
        """Return the next byte as a number. Raises CodecError at the end."""
        return self.take(1, what)[0]

    def varint(self, what: str, most: int) -> int:
        """Return the next whole number.

        Args:
            what: Name of the field, for the sentence.
            most: Largest value that makes sense here.

        Raises:
            CodecError: The bytes end, the number is longer than it need be, or it is above `most`.
        """
        value = 0
        for place in range(MAX_VARINT_BYTES):
            byte = self.byte(what)
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                if byte == 0 and place:
                    raise CodecError(f"expected {what} in as few bytes as it needs, got a padded number")
                if value > most:
                    raise CodecError(f"expected {what} of at most {most}, got {value}")
                return value
        raise CodecError(f"expected {what} below 2^63, got a longer number")

    def rest(self) -> memoryview:
        """Return all bytes that have not been read."""
        return self.take(self.left(), "the rest")

    def end(self, what: str) -> None:
        """Raise CodecError if bytes are left over after `what`."""
        if self.left():
            raise CodecError(f"expected the end after {what}, got {self.left()} more bytes")
