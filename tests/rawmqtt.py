"""MQTT 3.1.1 and 5 packets by hand, for what a client library hides: ids, flags, reason codes, who closes when.

Written from the OASIS texts. Every wait has a deadline; nothing sleeps. `Raw.before_pong()` is how a test says "and nothing
else came": it pings and returns what arrived before the answer.
"""

import socket
import struct
import time
from dataclasses import dataclass, field

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 1, 2, 3, 4, 5, 6, 7
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = 8, 9, 10, 11, 12, 13, 14, 15
NAMES = (
    "reserved CONNECT CONNACK PUBLISH PUBACK PUBREC PUBREL PUBCOMP SUBSCRIBE SUBACK UNSUBSCRIBE UNSUBACK "
    "PINGREQ PINGRESP DISCONNECT AUTH"
).split()

# identifier: (name, kind)
PROPERTIES = {
    0x01: ("payload_format", "byte"),
    0x02: ("message_expiry", "four"),
    0x03: ("content_type", "text"),
    0x08: ("response_topic", "text"),
    0x09: ("correlation_data", "data"),
    0x0B: ("subscription_id", "variable"),
    0x11: ("session_expiry", "four"),
    0x12: ("assigned_client_id", "text"),
    0x13: ("server_keep_alive", "two"),
    0x15: ("auth_method", "text"),
    0x16: ("auth_data", "data"),
    0x17: ("request_problem", "byte"),
    0x18: ("will_delay", "four"),
    0x19: ("request_response", "byte"),
    0x1A: ("response_info", "text"),
    0x1C: ("server_reference", "text"),
    0x1F: ("reason", "text"),
    0x21: ("receive_maximum", "two"),
    0x22: ("topic_alias_maximum", "two"),
    0x23: ("topic_alias", "two"),
    0x24: ("maximum_qos", "byte"),
    0x25: ("retain_available", "byte"),
    0x26: ("user", "pair"),
    0x27: ("maximum_packet_size", "four"),
    0x28: ("wildcard_available", "byte"),
    0x29: ("subscription_id_available", "byte"),
    0x2A: ("shared_available", "byte"),
}
IDENTIFIERS = {name: (number, kind) for number, (name, kind) in PROPERTIES.items()}
# These may come more than once; they are always lists.
REPEATED = ("user", "subscription_id")


class Closed(Exception):
    """The other side ended the connection."""


@dataclass
class Packet:
    kind: int
    flags: int
    body: bytes
    packet_id: int = 0
    code: int = 0
    codes: list = field(default_factory=list)
    properties: dict = field(default_factory=dict)
    session_present: bool = False
    topic: str = ""
    payload: bytes = b""
    # Of a PUBLISH that came in: whether the test's side has answered it.
    acknowledged: bool = False

    @property
    def qos(self):
        return self.flags >> 1 & 3

    @property
    def dup(self):
        return bool(self.flags & 8)

    @property
    def retain(self):
        return bool(self.flags & 1)

    def __str__(self):
        what = f"{self.topic!r} {self.payload[:40]!r} qos {self.qos}" if self.kind == PUBLISH else f"code 0x{self.code:02x}"
        return f"{NAMES[self.kind]} id {self.packet_id} {what} {self.properties or ''}"

    __repr__ = __str__


def variable(value):
    out = bytearray()
    while True:
        value, digit = value >> 7, value & 0x7F
        out.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(out)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("!H", len(data)) + data


def properties(values):
    """{"user": [("a", "b")], "message_expiry": 5} → the bytes, length first."""
    out = b""
    for name, value in values.items():
        number, kind = IDENTIFIERS[name]
        for one in value if name in REPEATED and isinstance(value, list) else [value]:
            out += bytes([number])
            out += {
                "byte": lambda v: bytes([v]),
                "two": lambda v: struct.pack("!H", v),
                "four": lambda v: struct.pack("!I", v),
                "variable": variable,
                "text": text,
                "data": text,
                "pair": lambda v: text(v[0]) + text(v[1]),
            }[kind](one)
    return variable(len(out)) + out


def packet(kind, flags, body):
    return bytes([kind << 4 | flags]) + variable(len(body)) + body


def connect(version, client_id, clean=True, keep_alive=60, will=None, user=None, password=None, props=None, level=None, name="MQTT"):
    """`will`: (topic, payload, qos, retain) or with a dict of will properties as the fifth."""
    flags = (2 if clean else 0) | (0x80 if user is not None else 0) | (0x40 if password is not None else 0)
    payload = text(client_id)
    if will:
        topic, message, qos, retain = will[:4]
        flags |= 4 | qos << 3 | (0x20 if retain else 0)
        if version == 5:
            payload += properties(will[4] if len(will) > 4 else {})
        payload += text(topic) + text(message)
    if user is not None:
        payload += text(user)
    if password is not None:
        payload += text(password)
    head = text(name) + bytes([level if level is not None else version, flags]) + struct.pack("!H", keep_alive)
    if version == 5:
        head += properties(props or {})
    return packet(CONNECT, 0, head + payload)


def publish(version, topic, payload, qos=0, packet_id=0, retain=False, dup=False, props=None):
    payload = payload.encode() if isinstance(payload, str) else payload
    body = text(topic) + (struct.pack("!H", packet_id) if qos else b"")
    if version == 5:
        body += properties(props or {})
    return packet(PUBLISH, qos << 1 | (1 if retain else 0) | (8 if dup else 0), body + payload)


def ack(kind, packet_id, version=4, code=0):
    body = struct.pack("!H", packet_id) + (bytes([code]) if version == 5 and code else b"")
    return packet(kind, 2 if kind == PUBREL else 0, body)


def subscribe(version, packet_id, filters, props=None):
    """`filters`: [(filter, options byte)]"""
    body = struct.pack("!H", packet_id) + (properties(props or {}) if version == 5 else b"")
    return packet(SUBSCRIBE, 2, body + b"".join(text(f) + bytes([o]) for f, o in filters))


def unsubscribe(version, packet_id, filters):
    body = struct.pack("!H", packet_id) + (properties({}) if version == 5 else b"")
    return packet(UNSUBSCRIBE, 2, body + b"".join(text(f) for f in filters))


def _read_properties(body, at):
    length, at = _read_variable(body, at)
    end, out = at + length, {}
    while at < end:
        name, kind = PROPERTIES[body[at]]
        at += 1
        if kind == "byte":
            value, at = body[at], at + 1
        elif kind == "two":
            value, at = struct.unpack_from("!H", body, at)[0], at + 2
        elif kind == "four":
            value, at = struct.unpack_from("!I", body, at)[0], at + 4
        elif kind == "variable":
            value, at = _read_variable(body, at)
        else:
            value, at = _read_text(body, at)
            if kind == "pair":
                second, at = _read_text(body, at)
                value = (value.decode(), second.decode())
            elif kind == "text":
                value = value.decode()
        if name in REPEATED:
            out.setdefault(name, []).append(value)
        else:
            assert name not in out, f"property {name} came twice"
            out[name] = value
    assert at == end, "properties end where their length says"
    return out, at


def _read_variable(body, at):
    value = shift = 0
    while True:
        value |= (body[at] & 0x7F) << shift
        shift += 7
        at += 1
        if body[at - 1] < 0x80:
            return value, at


def _read_text(body, at):
    end = at + 2 + struct.unpack_from("!H", body, at)[0]
    assert end <= len(body), "a string ends within its packet"
    return body[at + 2 : end], end


def parse(version, first, body):
    p = Packet(first >> 4, first & 15, body)
    if p.kind == CONNACK:
        p.session_present, p.code = bool(body[0] & 1), body[1]
        if version == 5 and len(body) > 2:
            p.properties, _ = _read_properties(body, 2)
    elif p.kind == PUBLISH:
        topic, at = _read_text(body, 0)
        p.topic = topic.decode()
        if p.qos:
            p.packet_id, at = struct.unpack_from("!H", body, at)[0], at + 2
        if version == 5:
            p.properties, at = _read_properties(body, at)
        p.payload = body[at:]
    elif p.kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
        p.packet_id = struct.unpack_from("!H", body)[0]
        if len(body) > 2:
            p.code = body[2]
        if len(body) > 3:
            p.properties, _ = _read_properties(body, 3)
    elif p.kind in (SUBACK, UNSUBACK):
        p.packet_id, at = struct.unpack_from("!H", body)[0], 2
        if version == 5:
            p.properties, at = _read_properties(body, at)
        p.codes = list(body[at:])
    elif p.kind == DISCONNECT and body:
        p.code = body[0]
        if len(body) > 1:
            p.properties, _ = _read_properties(body, 1)
    return p


class Raw:
    """One connection. `Raw(port, 5).open("id")` connects and keeps the CONNACK in `connack`."""

    def __init__(self, port, version=4, host="127.0.0.1", timeout=10):
        self.version, self.timeout = version, timeout
        self.inbox = bytearray()
        self.early = []
        self.next_id = 0
        self.connack = None
        self.socket = socket.create_connection((host, port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # -- Out.

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (ConnectionError, BrokenPipeError) as error:
            raise Closed(str(error)) from error

    def open(self, client_id, expect_code=0, **options):
        self.send(connect(self.version, client_id, **options))
        self.connack = self.expect(CONNACK)
        assert self.connack.code == expect_code, f"CONNACK 0x{self.connack.code:02x}, expected 0x{expect_code:02x}"
        return self

    def new_id(self):
        self.next_id = self.next_id % 65535 + 1
        return self.next_id

    def publish(self, topic, payload, qos=0, packet_id=None, **options):
        packet_id = packet_id or (self.new_id() if qos else 0)
        self.send(publish(self.version, topic, payload, qos, packet_id, **options))
        return packet_id

    def publish_acked(self, topic, payload, qos=1, **options):
        """Publishes and does the whole handshake; returns the code of the first acknowledgement. QoS 0: a ping after it."""
        packet_id = self.publish(topic, payload, qos, **options)
        if qos == 0:
            self.early = self.before_pong() + self.early
            return 0
        first = self.expect(PUBACK if qos == 1 else PUBREC, packet_id=packet_id)
        if qos == 2 and first.code < 0x80:
            self.send(ack(PUBREL, packet_id))
            self.expect(PUBCOMP, packet_id=packet_id)
        return first.code

    def subscribe(self, *filters, props=None):
        """Filters as "a/#" (QoS 1), ("a/#", 2) or ("a/#", options byte); returns the SUBACK's codes."""
        packet_id = self.new_id()
        pairs = [f if isinstance(f, tuple) else (f, 1) for f in filters]
        self.send(subscribe(self.version, packet_id, pairs, props))
        return self.expect(SUBACK, packet_id=packet_id).codes

    def unsubscribe(self, *filters):
        packet_id = self.new_id()
        self.send(unsubscribe(self.version, packet_id, filters))
        return self.expect(UNSUBACK, packet_id=packet_id).codes

    def acknowledge(self, p):
        """PUBACK, or the whole of a QoS 2 receipt; nothing where that was done."""
        if p.acknowledged:
            return
        p.acknowledged = True
        if p.qos == 1:
            self.send(ack(PUBACK, p.packet_id))
        elif p.qos == 2:
            self.send(ack(PUBREC, p.packet_id))
            self.expect(PUBREL, packet_id=p.packet_id)
            self.send(ack(PUBCOMP, p.packet_id))

    def disconnect(self, code=0, props=None):
        body = b"" if self.version == 4 or (code == 0 and not props) else bytes([code]) + properties(props or {})
        self.send(packet(DISCONNECT, 0, body))
        # Until the other side has closed it has perhaps not read it, and a next connection could overtake it.
        self.expect_closed()
        self.close()

    def close(self):
        self.socket.close()

    def reset(self):
        """Gone without a word, as a device that lost power: no FIN that could be taken for an orderly end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # -- In.

    def read(self, timeout=None):
        """The next packet in order of arrival. Raises Closed, or TimeoutError."""
        if self.early:
            return self.early.pop(0)
        return self._read(timeout)

    def _read(self, timeout=None):
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            whole = self._take()
            if whole:
                return whole
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no packet came in time")
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(65536)
            except socket.timeout:
                continue
            except ConnectionError as error:
                raise Closed(str(error)) from error
            if not data:
                raise Closed("end of stream")
            self.inbox += data

    def _take(self):
        inbox = self.inbox
        length = shift = 0
        for at in range(1, min(len(inbox), 5)):
            length |= (inbox[at] & 0x7F) << shift
            shift += 7
            if inbox[at] < 0x80:
                end = at + 1 + length
                if len(inbox) < end:
                    return None
                first, body = inbox[0], bytes(inbox[at + 1 : end])
                del inbox[:end]
                return parse(self.version, first, body)
        return None

    def expect(self, kind, packet_id=None, timeout=None):
        """The next packet of that kind; PUBLISHes that come before it are kept for `read` and `message`."""
        for index, p in enumerate(self.early):
            if p.kind == kind and packet_id in (None, p.packet_id):
                return self.early.pop(index)
        while True:
            p = self._read(timeout)
            if p.kind == kind and packet_id in (None, p.packet_id):
                return p
            if p.kind == DISCONNECT and kind != DISCONNECT:
                raise AssertionError(f"expected {NAMES[kind]}, got {p}")
            assert p.kind != kind, f"expected {NAMES[kind]} {packet_id}, got {p}"
            self.early.append(p)

    def message(self, timeout=None, acknowledge=True):
        p = self.expect(PUBLISH, timeout=timeout)
        if acknowledge:
            self.acknowledge(p)
        return p

    def messages(self, count, timeout=None):
        return [self.message(timeout) for _ in range(count)]

    def before_pong(self):
        """What came before the answer to a ping sent now, messages acknowledged."""
        self.send(packet(PINGREQ, 0, b""))
        out = []
        while True:
            p = self.read()
            if p.kind == PINGRESP:
                return out
            if p.kind == PUBLISH:
                self.acknowledge(p)
            out.append(p)

    def before_pong_untouched(self):
        """The same without acknowledging; what came stays to be read."""
        self.send(packet(PINGREQ, 0, b""))
        self.expect(PINGRESP)
        return list(self.early)

    def until(self, topic, timeout=None):
        """Messages up to the one on `topic`, that one excluded, all acknowledged: a marker shows that nothing else came."""
        out = []
        while True:
            p = self.message(timeout)
            if p.topic == topic:
                return out
            out.append(p)

    def nothing_but(self, topic):
        """True if a QoS 1 message published now to `topic`, which this client subscribes to, is the next that comes. What
        is read from the log comes when it is read: a ping alone may be answered before."""
        with Raw(self.socket.getpeername()[1], 4).open("nothing-but") as marker:
            marker.publish_acked(topic, "nothing but this")
        p = self.message()
        assert p.payload == b"nothing but this", f"first came {p}"
        return True

    def expect_closed(self, timeout=None):
        """Reads until the other side closes; returns what it said before."""
        out, self.early = self.early, []
        while True:
            try:
                out.append(self._read(timeout))
            except Closed:
                return out
