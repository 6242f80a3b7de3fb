"""Plain values between two sandboxes, by pickle without anything that names code. Begins both programs, as text."""

import io
import os
import pickle
import struct

MOST = 64 << 20  # bytes of one message


class PlainValues(pickle.Unpickler):
    """Numbers, texts, bytes, lists, tuples, dicts, sets, None: nothing that can act."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"a value of {module}.{name} is no plain data")


class Channel:
    """Messages over this process's standard input and output, which the program itself loses to /dev/null."""

    def __init__(self):
        self._in, self._out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)

    def send(self, value):
        message = pickle.dumps(value, protocol=4)
        self._out.write(struct.pack("<q", len(message)) + message)
        self._out.flush()

    def receive(self):
        (size,) = struct.unpack("<q", self._exactly(8))
        if not 0 <= size <= MOST:
            raise pickle.UnpicklingError(f"a message of {size} bytes")
        return PlainValues(io.BytesIO(self._exactly(size))).load()

    def _exactly(self, size):
        data = self._in.read(size)
        if len(data) != size:
            raise EOFError
        return data
