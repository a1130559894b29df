"""A scripted upstream MQTT broker, 3.1.1 and 5, for the uplink tests. Standard library only.

It records every PUBLISH in the order of arrival and misbehaves on demand: cuts at random moments, shrinking grants,
refusals, PINGRESPs without PUBACKs, connections dropped after CONNACK. Behaviour is set by plain attributes, also while
it runs. It speaks plain TCP, TLS (`tls=` an ssl.SSLContext) and WebSocket (`websocket=True`).

    upstream = StandIn(port=0).start()          # a thread of its own
    upstream.receive_maximum = [10, 3, None]    # one for each connection, the last one stays
    upstream.wait_for(1000, timeout=30)
    [m.payload for m in upstream.messages]
    upstream.stop()

In a test with an event loop: `await upstream.serve()` instead of `start()`, `await upstream.close()` instead of `stop()`.
"""

import asyncio
import base64
import hashlib
import random
import threading
import time
from dataclasses import dataclass, field

CUTS = ("before-connack", "unread", "before-puback", "half-puback", "after-puback")
SUCCESS, QUOTA_EXCEEDED = 0x00, 0x97


@dataclass(slots=True)
class Message:
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    properties: dict
    connection: int
    # The reason code it was answered with; None: no answer was even tried.
    code: int | None
    at: float

    @property
    def accepted(self):
        return self.code is not None and self.code < 0x80


@dataclass
class Connection:
    """What is remembered of one connection, also after its end."""

    number: int
    at: float
    version: int = 0
    client_id: str = ""
    username: str | None = None
    password: bytes | None = None
    clean: bool = False
    keep_alive: int = 0
    properties: dict = field(default_factory=dict)
    subscriptions: list = field(default_factory=list)
    granted: int | None = None
    in_flight_max: int = 0
    publishes: int = 0
    pings: int = 0
    disconnected: bool = False
    ended: float | None = None


class StandIn:
    def __init__(self, port=0, host="127.0.0.1", tls=None, websocket=False, seed=None):
        self.host, self.port, self.tls, self.websocket = host, port, tls, websocket
        self.random = random.Random(seed)

        # -- Behaviour; each may be changed at any time and counts from the next packet or connection on.
        self.connack_code = 0  # other than 0: every connection is refused with it
        self.session_present = 0  # 0, 1 or "random"
        self.receive_maximum = None  # None, a number, or a list: one for each connection, the last one stays
        self.maximum_packet_size = None  # announced (version 5)
        self.packet_limit = None  # not announced: a larger packet ends the connection
        self.server_keep_alive = None
        self.maximum_qos = None
        self.ack = True  # False: no PUBACK ever
        self.ack_delay = None  # seconds by which PUBACKs are late, sent together
        self.ping = True  # False: no PINGRESP
        self.refuse_every = None  # every N-th PUBLISH is refused (version 5) …
        self.refuse_code = QUOTA_EXCEEDED
        self.refuse = None  # … or a function Message -> reason code
        self.drop_after_connack = False
        self.suback_code = None  # other than None: every subscription is answered with it
        self.cut_after = None  # (low, high): a connection is cut after a random number of PUBLISHes
        self.cut_kinds = CUTS
        self.on_subscribed = []  # (topic, payload, qos): sent on each connection after its SUBACK
        self.frozen = False  # neither reads nor answers, and does not close: see freeze()

        # -- Records.
        self.messages = []
        self.connections = []
        self.cuts = {kind: 0 for kind in CUTS}
        self.refused = 0
        self.commands_acknowledged = []  # (connection number, packet id, payload) in order of the PUBACKs
        self.violations = []  # what the client must never do, in words
        self._distinct = set()
        self._changed = threading.Condition()
        self._live = set()
        self._server = self._loop = self._thread = None

    # -- For threads.

    def start(self):
        ready = threading.Event()
        failure = []

        def main():
            async def run():
                try:
                    await self.serve()
                except BaseException as error:  # told to start(), which raises it
                    failure.append(error)
                    ready.set()
                    return
                self._end = asyncio.Event()
                ready.set()
                await self._end.wait()
                await self.close()

            asyncio.run(run())

        self._thread = threading.Thread(target=main, name="standin", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            raise failure[0]
        return self

    def stop(self):
        """Closes everything. The records stay; start() begins again on the same port, with an empty session store."""
        if self._thread:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
            self._thread = None

    def restart(self, down=0.0):
        """Gone and back on the same port, empty: whoever was connected is cut."""
        self.stop()
        time.sleep(down)
        self.start()

    def __enter__(self):
        return self.start() if not self._thread else self

    def __exit__(self, *_):
        self.stop()

    def cut_all(self):
        """Resets every connection now."""
        self._call(lambda: [peer.abort() for peer in list(self._live)])

    def freeze(self):
        """As a dead link: nothing is read, nothing answered, nothing closed."""

        def act():
            self.frozen = True
            for peer in self._live:
                peer.transport.pause_reading()

        self._call(act)

    def thaw(self, reset=True):
        """The link is back; by default the old connections are reset."""

        def act():
            self.frozen = False
            for peer in list(self._live):
                peer.abort() if reset else peer.transport.resume_reading()

        self._call(act)

    def publish(self, topic, payload, qos=1, retain=False):
        """A message down to every connected client that subscribed to it. Returns to how many."""
        payload = payload.encode() if isinstance(payload, str) else payload

        def act():
            peers = [p for p in self._live if p.subscribed_to(topic)]
            for peer in peers:
                peer.send_publish(topic, payload, qos, retain)
            return len(peers)

        return self._call(act)

    def wait_for(self, count, timeout):
        """Waits until `count` distinct messages (topic and payload) were accepted; returns how many there are."""
        self.wait_until(lambda: len(self._distinct) >= count, timeout, f"{count} distinct messages")
        return len(self._distinct)

    def wait_for_connections(self, count, timeout):
        self.wait_until(lambda: len(self.connections) >= count, timeout, f"{count} connections")

    def wait_until(self, condition, timeout, what="it"):
        """Waits for a condition on the records; they are looked at after each thing that happens."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{what} within {timeout} s: not so; {self.summary()}")
                # The time limit is for conditions that look at more than the records.
                self._changed.wait(min(left, 1.0))

    # -- What the records say.

    @property
    def accepted(self):
        return [m for m in self.messages if m.accepted]

    @property
    def distinct(self):
        return len(self._distinct)

    @property
    def duplicates(self):
        return sum(m.accepted for m in self.messages) - len(self._distinct)

    def out_of_order(self, key=lambda m: m.topic, number=lambda m: int(m.payload)):
        """Arrivals (refused ones too) that skip ahead of one not yet seen, and first arrivals that come late, by key.
        Numbers of a key must rise; they need not be without gaps."""
        wrong = []
        numbers, seen = {}, {}
        for message in self.messages:
            numbers.setdefault(key(message), set()).add(number(message))
        following = {}
        for k, values in numbers.items():
            ordered = sorted(values)
            following[k] = dict(zip([None] + ordered, ordered))
        for message in self.messages:
            k, n = key(message), number(message)
            last = seen.get(k)
            if last is None or n > last:
                if following[k].get(last) != n:
                    wrong.append((k, last, n))
                seen[k] = n
        return wrong

    def summary(self):
        return (
            f"{len(self.messages)} PUBLISHes, {len(self._distinct)} distinct, {self.refused} refused, "
            f"{len(self.connections)} connections, cuts {self.cuts}, violations {self.violations[:3]}"
        )

    # -- For event loops.

    async def serve(self):
        self._loop = asyncio.get_running_loop()
        self._server = await self._loop.create_server(
            lambda: _Peer(self), self.host, self.port, ssl=self.tls, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self):
        self._server.close()
        for peer in list(self._live):
            peer.abort()
        await asyncio.sleep(0)

    # -- Inside.

    def _call(self, act):
        if self._loop is None:
            return act()
        if threading.current_thread() is self._thread or self._thread is None:
            return act()
        done = threading.Event()
        result = []

        def run():
            try:
                result.append(act())
            finally:
                done.set()

        self._loop.call_soon_threadsafe(run)
        if not done.wait(10):
            raise TimeoutError("the stand-in does not answer")
        return result[0]

    def _tell(self):
        with self._changed:
            self._changed.notify_all()

    def _grant(self, number):
        grants = self.receive_maximum
        if isinstance(grants, (list, tuple)):
            return grants[min(number, len(grants) - 1)]
        return grants


class _Peer(asyncio.Protocol):
    def __init__(self, standin):
        self.standin = standin
        self.inbox = bytearray()
        self.frames = bytearray() if standin.websocket else None
        self.upgraded = False
        self.open = True
        self.next_id = 0
        self.commands = {}
        self.unacked = set()
        self.late = []

    def connection_made(self, transport):
        s = self.standin
        self.transport = transport
        self.record = Connection(number=len(s.connections), at=time.monotonic())
        s.connections.append(self.record)
        s._live.add(self)
        self.cut_at = s.random.randint(*s.cut_after) if s.cut_after else None
        self.cut_kind = s.random.choice(s.cut_kinds) if s.cut_after else None
        s._tell()

    def connection_lost(self, _):
        self.open = False
        self.record.ended = time.monotonic()
        self.standin._live.discard(self)
        self.standin._tell()

    def abort(self):
        self.open = False
        self.transport.abort()

    def close(self):
        """What was written leaves first."""
        self.open = False
        self.transport.close()

    def write(self, data):
        if not self.open or not data or self.standin.frozen:
            return
        if self.frames is not None:
            # Split, so that packets span frames.
            half = len(data) // 2
            data = _frame(data[:half]) + _frame(data[half:]) if half else _frame(data)
        self.transport.write(data)

    def data_received(self, data):
        if self.standin.frozen or not self.open:
            return
        if self.frames is not None:
            data = self.unframe(data)
        self.inbox += data
        try:
            self.work()
        except (IndexError, ValueError, UnicodeDecodeError) as error:
            self.standin.violations.append(f"malformed packet: {error!r}")
            self.abort()
        self.standin._tell()

    def work(self):
        inbox, at, acks = self.inbox, 0, []
        size = len(inbox)
        limit = self.standin.packet_limit
        while self.open and size - at >= 2:
            length, shift, start = 0, 0, at + 1
            complete = False
            while start < size and shift < 28:
                byte = inbox[start]
                length |= (byte & 0x7F) << shift
                start += 1
                shift += 7
                if byte < 0x80:
                    complete = True
                    break
            if not complete:
                if shift >= 28:
                    raise ValueError("remaining length")
                break
            end = start + length
            if limit and end - at > limit:
                self.write(b"".join(acks))
                self.close()
                return
            if size < end:
                break
            first = inbox[at]
            kind = first >> 4
            body = bytes(inbox[start:end])
            announced = self.standin.maximum_packet_size
            if announced and self.record.version == 5 and end - at > announced:
                self.standin.violations.append(f"a packet of {end - at} bytes above the announced {announced}")
            at = end
            if kind == 3:
                self.on_publish(first, body, acks)
            else:
                if acks:
                    self.write(b"".join(acks))
                    acks.clear()
                self.on_packet(kind, first, body)
        del inbox[:at]
        if acks:
            self.write(b"".join(acks))

    def on_publish(self, first, body, acks):
        s, record = self.standin, self.record
        if record.version == 0:
            raise ValueError("PUBLISH before CONNECT")
        topic_end = 2 + (body[0] << 8 | body[1])
        topic = body[2:topic_end].decode()
        qos, at, packet_id = (first >> 1) & 3, topic_end, 0
        if qos:
            packet_id = body[at] << 8 | body[at + 1]
            at += 2
        properties = {}
        if record.version == 5:
            if body[at] == 0:
                at += 1
            else:
                properties, at = _properties(body, at)
        message = Message(
            topic, body[at:], qos, bool(first & 1), bool(first & 8), properties, record.number, None, time.monotonic()
        )
        record.publishes += 1
        if qos:
            if packet_id == 0 or packet_id in self.unacked:
                s.violations.append(f"packet id {packet_id} is used twice")
            self.unacked.add(packet_id)
            if len(self.unacked) > record.in_flight_max:
                record.in_flight_max = len(self.unacked)
                if record.granted and len(self.unacked) > record.granted:
                    s.violations.append(f"{len(self.unacked)} in flight, granted {record.granted}")
        if self.cut_at is not None and record.publishes >= self.cut_at:
            self.cut(message, packet_id, acks)
            return
        s.messages.append(message)
        if qos == 0:
            message.code = SUCCESS
            s._distinct.add((topic, message.payload))
            return
        if not s.ack:
            return
        code = SUCCESS
        if record.version == 5:
            if s.refuse:
                code = s.refuse(message) or SUCCESS
            elif s.refuse_every and len(s.messages) % s.refuse_every == 0:
                code = s.refuse_code
        message.code = code
        if code >= 0x80:
            s.refused += 1
        else:
            s._distinct.add((topic, message.payload))
        ack = b"\x40\x02" + packet_id.to_bytes(2) if code == 0 else b"\x40\x03" + packet_id.to_bytes(2) + bytes([code])
        if qos == 2:
            ack = b"\x50\x02" + packet_id.to_bytes(2)
        if s.ack_delay is None:
            self.unacked.discard(packet_id)
            acks.append(ack)
        else:
            self.late.append((packet_id, ack))
            if len(self.late) == 1:
                asyncio.get_running_loop().call_later(s.ack_delay, self.send_late)

    def send_late(self):
        late, self.late = self.late, []
        self.unacked.difference_update(packet_id for packet_id, _ in late)
        self.write(b"".join(ack for _, ack in late))

    def cut(self, message, packet_id, acks):
        """Ends the connection in one of the ways that a network has. What was taken but not acknowledged counts as
        arrived: the client cannot know, and must send it again."""
        s, kind = self.standin, self.cut_kind
        s.cuts[kind] += 1
        ack = b"\x40\x02" + packet_id.to_bytes(2)
        if kind == "unread":
            self.write(b"".join(acks))
        else:
            message.code = SUCCESS
            s.messages.append(message)
            s._distinct.add((message.topic, message.payload))
            if kind == "half-puback":
                self.write(b"".join(acks) + ack[: s.random.randint(1, 3)])
            elif kind == "after-puback":
                self.write(b"".join(acks) + ack)
            # before-puback: the acknowledgements of this read are lost with it.
        acks.clear()
        if s.random.random() < 0.5:
            self.abort()
        else:
            self.close()

    def on_packet(self, kind, first, body):
        s, record = self.standin, self.record
        if kind == 1:
            self.on_connect(body)
        elif record.version == 0:
            raise ValueError(f"packet {kind} before CONNECT")
        elif kind == 8:
            self.on_subscribe(body)
        elif kind == 12:
            record.pings += 1
            if s.ping:
                self.write(b"\xd0\x00")
        elif kind == 14:
            record.disconnected = True
            self.close()
        elif kind == 4 or kind == 7:
            packet_id = body[0] << 8 | body[1]
            if packet_id not in self.commands:
                s.violations.append(f"acknowledgement of {packet_id}, which was not sent")
                return
            s.commands_acknowledged.append((record.number, packet_id, self.commands.pop(packet_id)))
        elif kind == 5:
            self.write(b"\x62\x02" + body[:2])
        elif kind == 6:
            self.write(b"\x70\x02" + body[:2])
        else:
            raise ValueError(f"packet type {kind}")

    def on_connect(self, body):
        s, record = self.standin, self.record
        if record.version:
            raise ValueError("CONNECT twice")
        if body[:6] != b"\x00\x04MQTT" or body[6] not in (4, 5):
            raise ValueError("protocol name or level")
        record.version, flags = body[6], body[7]
        record.clean = bool(flags & 2)
        record.keep_alive = body[8] << 8 | body[9]
        at = 10
        if record.version == 5:
            record.properties, at = _properties(body, at)
        client_id, at = _string(body, at)
        record.client_id = client_id.decode()
        if flags & 4:
            raise ValueError("a will was not expected")
        if flags & 0x80:
            username, at = _string(body, at)
            record.username = username.decode()
        if flags & 0x40:
            record.password, at = _string(body, at)
        if at != len(body):
            raise ValueError("bytes after CONNECT")
        for other in list(s._live):
            if other is not self and other.record.client_id == record.client_id:
                other.abort()
        if self.cut_kind == "before-connack":
            s.cuts["before-connack"] += 1
            self.abort()
            return
        code = s.connack_code
        present = s.random.randint(0, 1) if s.session_present == "random" else s.session_present
        present = 0 if code else present
        if record.version == 4:
            self.write(bytes([0x20, 2, present, code]))
        else:
            record.granted = s._grant(record.number)
            properties = b""
            if record.granted:
                properties += b"\x21" + record.granted.to_bytes(2)
            if s.maximum_packet_size:
                properties += b"\x27" + s.maximum_packet_size.to_bytes(4)
            if s.server_keep_alive is not None:
                properties += b"\x13" + s.server_keep_alive.to_bytes(2)
            if s.maximum_qos is not None:
                properties += bytes([0x24, s.maximum_qos])
            self.write(bytes([0x20, 3 + len(properties), present, code, len(properties)]) + properties)
        if code or s.drop_after_connack:
            self.close()

    def on_subscribe(self, body):
        s, record = self.standin, self.record
        packet_id, at = body[:2], 2
        if record.version == 5:
            _, at = _properties(body, at)
        codes = []
        while at < len(body):
            topic_filter, at = _string(body, at)
            codes.append(min(body[at] & 3, 1) if s.suback_code is None else s.suback_code)
            at += 1
            if codes[-1] < 0x80:
                record.subscriptions.append(topic_filter.decode())
        suback = packet_id + (b"\x00" if record.version == 5 else b"") + bytes(codes)
        self.write(bytes([0x90, len(suback)]) + suback)
        for topic, payload, qos in s.on_subscribed:
            if self.subscribed_to(topic):
                self.send_publish(topic, payload.encode() if isinstance(payload, str) else payload, qos)

    def subscribed_to(self, topic):
        return self.open and any(_matches(f, topic) for f in self.record.subscriptions)

    def send_publish(self, topic, payload, qos=1, retain=False):
        body = len(topic.encode()).to_bytes(2) + topic.encode()
        if qos:
            self.next_id = self.next_id % 65535 + 1
            self.commands[self.next_id] = payload
            body += self.next_id.to_bytes(2)
        if self.record.version == 5:
            body += b"\x00"
        body += payload
        self.write(bytes([0x30 | qos << 1 | retain]) + _variable_length(len(body)) + body)

    # -- WebSocket (RFC 6455), the server's side.

    def unframe(self, data):
        self.frames += data
        frames = self.frames
        if not self.upgraded:
            end = frames.find(b"\r\n\r\n")
            if end < 0:
                return b""
            head = bytes(frames[:end]).decode("latin-1")
            del frames[: end + 4]
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head.split("\r\n")[1:])}
            key = headers.get("sec-websocket-key", "")
            if headers.get("sec-websocket-protocol") != "mqtt" or not key:
                self.standin.violations.append("the WebSocket request does not ask for the subprotocol mqtt")
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                self.close()
                return b""
            accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest())
            self.transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            self.upgraded = True
        payloads = []
        while len(frames) >= 6:
            opcode, length, at = frames[0] & 0x0F, frames[1] & 0x7F, 2
            if length == 126:
                length, at = int.from_bytes(frames[2:4]), 4
            elif length == 127:
                length, at = int.from_bytes(frames[2:10]), 10
            if len(frames) < at + 4 + length:
                break
            mask = bytes(frames[at : at + 4])
            at += 4
            masked = bytes(frames[at : at + length])
            del frames[: at + length]
            pad = mask * (length // 4 + 1)
            payload = (int.from_bytes(masked) ^ int.from_bytes(pad[:length])).to_bytes(length) if length else b""
            if opcode == 8:
                self.close()
            elif opcode == 9:
                self.transport.write(bytes([0x8A, len(payload)]) + payload)
            elif opcode in (0, 2):
                payloads.append(payload)
            elif opcode == 1:
                self.standin.violations.append("a WebSocket text frame")
        return b"".join(payloads)


def _frame(data):
    length = len(data)
    if length < 126:
        return bytes([0x82, length]) + data
    if length < 65536:
        return b"\x82\x7e" + length.to_bytes(2) + data
    return b"\x82\x7f" + length.to_bytes(8) + data


def _string(body, at):
    end = at + 2 + (body[at] << 8 | body[at + 1])
    if end > len(body):
        raise ValueError("a string beyond the packet's end")
    return body[at + 2 : end], end


def _variable_length(value):
    out = bytearray()
    while True:
        value, digit = value >> 7, value & 0x7F
        out.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(out)


_BYTE, _TWO, _FOUR, _VARIABLE, _STRING, _PAIR = range(6)
_PROPERTIES = {
    0x01: ("payload_format", _BYTE), 0x02: ("expiry", _FOUR), 0x03: ("content_type", _STRING),
    0x08: ("response_topic", _STRING), 0x09: ("correlation_data", _STRING), 0x0B: ("subscription_id", _VARIABLE),
    0x11: ("session_expiry", _FOUR), 0x17: ("request_problem_info", _BYTE), 0x19: ("request_response_info", _BYTE),
    0x21: ("receive_maximum", _TWO), 0x22: ("topic_alias_maximum", _TWO), 0x23: ("topic_alias", _TWO),
    0x26: ("user", _PAIR), 0x27: ("maximum_packet_size", _FOUR),
}  # fmt: skip


def _properties(body, at):
    """The properties by name (user properties as a list of pairs) and where they end."""
    length, shift = 0, 0
    while True:
        byte = body[at]
        at += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    end, found = at + length, {}
    while at < end:
        if body[at] not in _PROPERTIES:
            raise ValueError(f"property {body[at]:#04x}")
        name, kind = _PROPERTIES[body[at]]
        at += 1
        if kind == _PAIR:
            key, at = _string(body, at)
            value, at = _string(body, at)
            found.setdefault(name, []).append((key.decode(), value.decode()))
        elif kind == _STRING:
            value, at = _string(body, at)
            found[name] = value if name == "correlation_data" else value.decode()
        else:
            size = {_BYTE: 1, _TWO: 2, _FOUR: 4, _VARIABLE: 1}[kind]
            found[name] = int.from_bytes(body[at : at + size])
            at += size
    return found, end


def _matches(topic_filter, topic):
    parts, levels = topic_filter.split("/"), topic.split("/")
    for n, part in enumerate(parts):
        if part == "#":
            return True
        if n >= len(levels) or part not in ("+", levels[n]):
            return False
    return len(parts) == len(levels)


if __name__ == "__main__":
    import sys

    upstream = StandIn(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0).start()
    print(f"listening on {upstream.host}:{upstream.port}", flush=True)
    try:
        while True:
            time.sleep(1)
            print(upstream.summary(), flush=True)
    except KeyboardInterrupt:
        upstream.stop()
