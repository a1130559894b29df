"""A relay between the gateway and a Modbus server that does to answers what bad lines and bad devices do.

It knows what was asked and what was really answered, so that a test can say of each published value whether it is the one
that the device gave to the request before it.
"""

import asyncio
import os
import random
import threading
import time
import tty


def crc(data):
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return bytes((value & 0xFF, value >> 8))


class Request:
    """One request as it came, and what the server answered."""

    def __init__(self, at, frame, is_tcp):
        self.at, self.frame = at, frame
        body = frame[6:] if is_tcp else frame
        self.unit, self.function = body[0], body[1]
        self.start = int.from_bytes(body[2:4], "big")
        self.count = int.from_bytes(body[4:6], "big")
        self.answer = None
        self.since = time.monotonic()
        self.delivered = False
        # A stale answer that could not be told from its own came while it was open.
        self.excused = False

    def length(self):
        """Characters of its right answer on a serial line."""
        if self.function in (1, 2):
            return 5 + (self.count + 7) // 8
        return 5 + 2 * self.count if self.function in (3, 4, 23) else 8

    def looks_like(self, other):
        return (self.unit, self.function, self.length()) == (other.unit, other.function, other.length())


class Pty:
    """A serial port at `path` that can be pulled and put back."""

    def __init__(self, path):
        self.path, self.master = path, None

    def plug(self):
        self.master, slave = os.openpty()
        tty.setraw(slave)
        # It stays open, so that a gateway which opens anew does not hang up the line.
        self.slave = slave
        os.set_blocking(self.master, False)
        link = f"{self.path}.new"
        os.symlink(os.ttyname(slave), link)
        os.replace(link, self.path)

    def pull(self):
        if self.master is not None:
            os.close(self.slave)
            os.close(self.master)
            self.master = None


# What can happen to an answer; `plain` is no fault.
TCP_FAULTS = ["late", "late_into_next", "twice", "dropped", "other_transaction", "other_unit", "other_function", "truncated", "shorter", "longer",
              "noise_before", "noise_instead", "noise_after", "exception", "halves", "vanish", "slow"]
RTU_FAULTS = ["late", "late_into_next", "twice", "dropped", "other_unit", "other_function", "truncated", "shorter", "longer",
              "noise_before", "noise_instead", "noise_after", "flipped", "exception", "halves", "vanish", "slow"]


class Line:
    """One line: a front that the gateway talks to, a back to the server. All its coroutines run in the relay's thread."""

    def __init__(self, relay, kind, back, front, timeout, seed, fault_every, unit_gap=0.0, baud=None):
        self.relay, self.kind, self.back, self.front = relay, kind, back, front
        self.is_tcp = kind == "tcp"
        self.timeout, self.random = timeout, random.Random(seed)
        self.fault_every, self.baud = fault_every, baud
        self.requests = []
        self.faults = {}
        self.last_stale = None
        self.held = None
        self.next_fault = None
        self.is_open = True
        self.connections = 0
        self.turnaround = []
        self.undetectable = 0

    # -- The gateway's side -----------------------------------------------------------------------------------------------

    async def serve(self):
        if self.kind == "rtu":
            self.pty = Pty(self.front)
            self.pty.plug()
            await self.serve_pty()
            return
        self.server = await asyncio.start_server(self.connection, "127.0.0.1", self.front)

    async def connection(self, reader, writer):
        self.connections += 1
        if not self.is_open:
            writer.close()
            return
        link = Link(self, writer.write, writer.close)
        await link.open()
        try:
            while data := await reader.read(4096):
                link.take(data)
        except OSError:
            pass
        link.close()

    async def serve_pty(self):
        loop = asyncio.get_running_loop()
        master = self.pty.master

        def write(data):
            try:
                os.write(master, data)
            except OSError:
                pass

        def close():
            loop.remove_reader(master)
            link.close_back()
            self.pty.pull()
            self.pty.plug()
            loop.create_task(self.serve_pty())

        link = Link(self, write, close)
        await link.open()

        def ready():
            try:
                link.take(os.read(master, 4096))
            except OSError:
                pass

        loop.add_reader(master, ready)

    def asked(self, request):
        """Remembers it; called when it came whole."""
        if self.last_stale is not None:
            at, stale = self.last_stale
            # It may have arrived when the gateway had thrown away what was pending and the request was on its way here.
            if time.monotonic() - at < 0.004 and stale.looks_like(request) and not self.is_tcp:
                request.excused = True
                self.undetectable += 1
        self.requests.append(request)

    def stale(self, request, link):
        """An old answer is put on the line."""
        self.last_stale = (time.monotonic(), request)
        open_ = link.open_request
        if open_ is not None and open_ is not request and not open_.delivered and open_.looks_like(request) and not self.is_tcp:
            open_.excused = True
            self.undetectable += 1


class Link:
    """One connection of the gateway and its own one to the server."""

    def __init__(self, line, write, close):
        self.line, self.write_front, self.close_front = line, write, close
        self.buffer = b""
        self.open_request = None
        self.answers = b""
        self.waiting = []
        self.is_closed = False

    async def open(self):
        kind, place = self.line.back
        if kind == "pty":
            self.master = place
            loop = asyncio.get_running_loop()
            loop.add_reader(self.master, lambda: self.take_answer(os.read(self.master, 4096)))
            self.write_back = lambda data: os.write(self.master, data)
            return
        reader, self.writer = await asyncio.open_connection("127.0.0.1", place)
        self.write_back = self.writer.write
        self.task = asyncio.get_running_loop().create_task(self.pump(reader))

    async def pump(self, reader):
        try:
            while data := await reader.read(4096):
                self.take_answer(data)
        except OSError:
            pass

    def close_back(self):
        self.is_closed = True
        kind, _ = self.line.back
        if kind == "pty":
            asyncio.get_running_loop().remove_reader(self.master)
        else:
            self.writer.close()

    def close(self):
        if not self.is_closed:
            self.close_back()
        self.close_front()

    def later(self, delay, action, *args):
        asyncio.get_running_loop().call_later(delay, lambda: None if self.is_closed else action(*args))

    # -- Requests ---------------------------------------------------------------------------------------------------------

    def take(self, data):
        self.buffer += data
        while True:
            length = self.request_length()
            if length is None or len(self.buffer) < length:
                return
            frame, self.buffer = self.buffer[:length], self.buffer[length:]
            line = self.line
            request = Request(time.time(), frame, line.is_tcp)
            line.asked(request)
            if line.held is not None:
                # The answer of before comes now, in the window of this one.
                old, frame_ = line.held
                line.held = None
                self.open_request = request
                line.stale(old, self)
                self.send(frame_)
            self.open_request = request
            self.waiting = [request]
            self.answers = b""
            if line.baud:
                # A serial line needs its time for the characters of the request, too.
                self.later(len(frame) * 10 / line.baud, self.forward, frame)
            else:
                self.forward(frame)

    def forward(self, frame):
        self.forwarded = time.monotonic()
        self.write_back(frame)

    def request_length(self):
        buffer = self.buffer
        if self.line.is_tcp:
            return 6 + int.from_bytes(buffer[4:6], "big") if len(buffer) >= 6 else None
        if len(buffer) < 8:
            return None
        if buffer[1] in (15, 16):
            return 9 + buffer[6]
        if buffer[1] == 22:
            return 10
        return 13 + buffer[10] if buffer[1] == 23 and len(buffer) > 10 else 8

    # -- Answers ----------------------------------------------------------------------------------------------------------

    def take_answer(self, data):
        self.answers += data
        if not self.waiting:
            return
        request = self.waiting[0]
        head = 6 if self.line.is_tcp else 0
        if len(self.answers) < head + 3:
            return
        is_exception = self.answers[head + 1] & 0x80
        if self.line.is_tcp:
            length = 6 + int.from_bytes(self.answers[4:6], "big")
        else:
            length = 5 if is_exception else request.length()
        if len(self.answers) < length:
            return
        frame, self.answers = self.answers[:length], self.answers[length:]
        self.waiting = []
        if not is_exception and request.function in (3, 4):
            body = frame[head + 3:]
            first = int.from_bytes(body[:2], "big")
            request.answer = (first - request.start * 7 - request.unit * 1009) & 0xFFFF
        self.deliver(request, frame)

    def deliver(self, request, frame):
        line = self.line
        if line.baud:
            line.turnaround.append(time.monotonic() - self.forwarded)
            self.later(len(frame) * 10 / line.baud, self.send_right, request, frame)
            return
        fault = line.next_fault
        line.next_fault = None
        if fault is None and line.fault_every and line.random.random() < 1 / line.fault_every:
            fault = line.random.choice(TCP_FAULTS if line.is_tcp else RTU_FAULTS)
        if fault is None:
            self.send_right(request, frame)
            return
        line.faults[fault] = line.faults.get(fault, 0) + 1
        getattr(self, fault)(request, frame)

    def send(self, frame):
        if not self.is_closed:
            self.write_front(frame)

    def send_right(self, request, frame):
        request.delivered = True
        if time.monotonic() - request.since > 0.6 * self.line.timeout:
            # An overloaded machine: no fault of ours, but one all the same.
            self.line.faults["overload"] = self.line.faults.get("overload", 0) + 1
        self.send(frame)

    def send_stale(self, request, frame):
        self.line.stale(request, self)
        self.send(frame)

    def body(self, frame):
        """Unit, function and data."""
        return frame[6:] if self.line.is_tcp else frame[:-2]

    def framed(self, request, body):
        if self.line.is_tcp:
            return request.frame[:4] + len(body).to_bytes(2, "big") + body
        return body + crc(body)

    # -- Faults -----------------------------------------------------------------------------------------------------------

    def slow(self, request, frame):
        self.later(self.line.timeout * self.line.random.uniform(0.1, 0.5), self.send_right, request, frame)

    def late(self, request, frame):
        self.later(self.line.timeout * self.line.random.uniform(1.1, 4), self.send_stale, request, frame)

    def late_into_next(self, request, frame):
        self.line.held = (request, frame)

    def twice(self, request, frame):
        self.send_right(request, frame)
        self.later(self.line.random.uniform(0, 0.04), self.send_stale, request, frame)

    def dropped(self, request, frame):
        pass

    def other_transaction(self, request, frame):
        self.send(bytes((frame[0], frame[1] ^ self.line.random.randint(1, 255))) + frame[2:])

    def other_unit(self, request, frame):
        body = self.body(frame)
        self.send(self.framed(request, bytes((body[0] ^ self.line.random.randint(1, 255),)) + body[1:]))

    def other_function(self, request, frame):
        body = self.body(frame)
        self.send(self.framed(request, bytes((body[0], 3 if body[1] != 3 else 4)) + body[2:]))

    def truncated(self, request, frame):
        self.send(frame[: self.line.random.randrange(1, len(frame))])

    def shorter(self, request, frame):
        self.resized(request, frame, -1)

    def longer(self, request, frame):
        self.resized(request, frame, 1)

    def resized(self, request, frame, by):
        body = self.body(frame)
        by *= 2 * self.line.random.randint(1, 3)
        if request.function not in (3, 4) or body[1] & 0x80 or body[2] + by <= 0:
            self.send_right(request, frame)
            return
        data = (body[3:] + bytes(8))[: body[2] + by]
        self.send(self.framed(request, bytes((body[0], body[1], body[2] + by)) + data))

    def noise(self, most):
        return bytes(self.line.random.randrange(256) for _ in range(self.line.random.randint(1, most)))

    def noise_before(self, request, frame):
        self.send(self.noise(4) + frame)

    def noise_instead(self, request, frame):
        self.send(self.noise(40))

    def noise_after(self, request, frame):
        request.delivered = True
        self.send(frame + self.noise(40))

    def flipped(self, request, frame):
        at = self.line.random.randrange(len(frame))
        self.send(frame[:at] + bytes((frame[at] ^ 1 << self.line.random.randrange(8),)) + frame[at + 1:])

    def exception(self, request, frame):
        body = bytes((request.unit, request.function | 0x80, self.line.random.randint(1, 11)))
        self.send(self.framed(request, body))

    def halves(self, request, frame):
        half = len(frame) // 2
        self.send(frame[:half])
        self.later(self.line.timeout * self.line.random.uniform(1.1, 2), self.send_stale, request, frame[half:])

    def vanish(self, request, frame):
        self.close()


class Relay:
    """The thread that all lines run in."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.lines = []

    def line(self, kind, back, front, timeout=0.06, seed=0, fault_every=0, baud=None):
        line = Line(self, kind, back, front, timeout, seed, fault_every, baud=baud)
        asyncio.run_coroutine_threadsafe(line.serve(), self.loop).result(10)
        self.lines.append(line)
        return line

    def end(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)


def back_pty(path):
    """For a server that opens a serial port: the relay's end of it."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    os.symlink(os.ttyname(slave), path)
    return ("pty", master)
