"""What the MQTT specifications say to a stream of bytes from a client: an independent judge for mutated packets.

`Judge.stream(data)` walks the stream as a server has to and returns what must be answered and how it ends. Written from the OASIS
texts, not from the gateway's code. Where a packet has several faults any of their reasons will do, since a server may find any of
them first; where the specification leaves a server the choice, the judge says EITHER and nothing behind it is judged.
"""

import struct
from dataclasses import dataclass, field

from rawmqtt import (
    AUTH,
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PINGRESP,
    PROPERTIES,
    PUBACK,
    PUBCOMP,
    PUBLISH,
    PUBREC,
    PUBREL,
    REPEATED,
    SUBACK,
    SUBSCRIBE,
    UNSUBACK,
    UNSUBSCRIBE,
    packet,
)

# How a stream ends: it goes on; it must be closed; the client said goodbye; a packet is not here whole; a server may choose.
ALIVE, CLOSED, GOODBYE, PENDING, EITHER = "alive", "closed", "goodbye", "pending", "either"

MALFORMED, PROTOCOL, TOPIC_NAME, FILTER, ALIAS, TOO_LARGE = 0x81, 0x82, 0x90, 0x8F, 0x94, 0x95
LEVELS_MAX = 200
ALIAS_MAX = 16

ALLOWED = {
    CONNECT: {
        "session_expiry",
        "receive_maximum",
        "maximum_packet_size",
        "topic_alias_maximum",
        "request_response",
        "request_problem",
        "user",
        "auth_method",
        "auth_data",
    },
    "will": {"will_delay", "payload_format", "message_expiry", "content_type", "response_topic", "correlation_data", "user"},
    PUBLISH: {
        "payload_format",
        "message_expiry",
        "topic_alias",
        "response_topic",
        "correlation_data",
        "user",
        "subscription_id",
        "content_type",
    },
    PUBACK: {"reason", "user"},
    SUBSCRIBE: {"subscription_id", "user"},
    UNSUBSCRIBE: {"user"},
    DISCONNECT: {"session_expiry", "reason", "user", "server_reference"},
    AUTH: {"auth_method", "auth_data", "reason", "user"},
}
REASONS = {
    PUBACK: {0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99},
    PUBREL: {0x00, 0x92},
    DISCONNECT: {0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99},
    AUTH: {0x00, 0x18, 0x19},
}


class Cut(Exception):
    """The packet cannot be read on."""


class Choice(Exception):
    """The specification leaves it to the server."""


@dataclass
class Ending:
    how: str
    # Reasons that a DISCONNECT (or CONNACK) may carry; empty: any.
    codes: set = field(default_factory=set)
    # The CONNACK's codes that are right; None: there need not be one.
    connack: set = None
    version: int = 4
    # (kind, packet id, how many codes) that must be answered, in any order, and those that may be.
    owed: list = field(default_factory=list)
    allowed: list = field(default_factory=list)
    packets: int = 0
    why: str = ""


class Reader:
    """A body read from its start; faults that do not hinder reading on are gathered."""

    def __init__(self, body):
        self.body, self.at, self.faults, self.choice = body, 0, set(), False

    def fault(self, *codes):
        self.faults.update(codes)

    def take(self, count):
        if self.at + count > len(self.body):
            self.fault(MALFORMED)
            raise Cut
        self.at += count
        return self.body[self.at - count : self.at]

    def byte(self):
        return self.take(1)[0]

    def two(self):
        return struct.unpack("!H", self.take(2))[0]

    def four(self):
        return struct.unpack("!I", self.take(4))[0]

    def variable(self):
        value = shift = 0
        for n in range(4):
            digit = self.byte()
            value |= (digit & 0x7F) << shift
            shift += 7
            if digit < 0x80:
                # More bytes than needed [MQTT-1.5.5-1]: most servers do not mind.
                self.choice |= n > 0 and digit == 0
                return value
        self.fault(MALFORMED)
        raise Cut

    def data(self):
        return self.take(self.two())

    def text(self, *also):
        """[MQTT-1.5.4-1, -2]; `also`: what else may be said of a bad one."""
        data = self.data()
        try:
            value = data.decode()
        except UnicodeDecodeError:
            self.fault(MALFORMED, *also)
            return ""
        if "\0" in value:
            self.fault(MALFORMED, *also)
        return value

    def id(self):
        """[MQTT-2.2.1-3]: not 0; which reason is not said."""
        value = self.two()
        if value == 0:
            self.fault(MALFORMED, PROTOCOL)
        return value

    def properties(self, kind):
        length = self.variable()
        inner = Reader(self.take(length))
        inner.faults, out = self.faults, {}
        while inner.at < length:
            # An identifier is a variable byte integer (2.2.2.2); all known ones are below 128.
            name, form = PROPERTIES.get(inner.variable(), (None, None))
            if name is None or name not in ALLOWED[kind]:
                self.fault(MALFORMED, PROTOCOL) if name else self.fault(MALFORMED)
                raise Cut
            if name in out and name not in REPEATED or name == "subscription_id" and name in out and kind == SUBSCRIBE:
                self.fault(PROTOCOL)
            if form == "variable":
                # One that the properties' end cuts may be read on behind it, and be 0.
                cut = inner.body[inner.at :]
                if all(b >= 0x80 for b in cut):
                    self.fault(MALFORMED, PROTOCOL)
            out[name] = {
                "byte": inner.byte,
                "two": inner.two,
                "four": inner.four,
                "variable": inner.variable,
                "data": inner.data,
                "text": lambda: inner.text(*([TOPIC_NAME] if name == "response_topic" else [])),
                "pair": lambda: (inner.text(), inner.text()),
            }[form]()
            if name in ("payload_format", "request_problem", "request_response") and out[name] > 1:
                # Only for the latter two is the reason named (3.1.2.11.6, -.7).
                self.fault(PROTOCOL, *([MALFORMED] if name == "payload_format" else []))
            if name in ("receive_maximum", "maximum_packet_size", "subscription_id") and out[name] == 0:
                self.fault(PROTOCOL)
        self.choice |= inner.choice
        return out

    def end(self):
        if self.at != len(self.body):
            self.fault(MALFORMED)


def topic_faults(r, topic):
    """Of a topic to publish to: [MQTT-3.3.2-2], [MQTT-4.7.3-1]."""
    if "+" in topic or "#" in topic:
        r.fault(TOPIC_NAME)
    if topic.count("/") >= LEVELS_MAX:
        r.choice = True


def filter_faults(r, topic_filter):
    levels = topic_filter.split("/")
    bad = not topic_filter or any("#" in level and (level != "#" or n + 1 < len(levels)) for n, level in enumerate(levels))
    if bad or any("+" in level and level != "+" for level in levels):
        r.fault(MALFORMED, PROTOCOL, FILTER)
    if len(levels) > LEVELS_MAX:
        r.choice = True


class Judge:
    def __init__(self, packet_bytes_max=1 << 20, connect_bytes_max=256 << 10):
        self.maximum, self.connect_maximum = packet_bytes_max, connect_bytes_max
        self.version = None
        self.expiry = 0
        self.aliases = set()
        self.received = set()

    def stream(self, data):
        end = Ending(ALIVE)
        at = 0
        while at < len(data):
            length = shift = 0
            header = None
            for n in range(1, 5):
                if at + n >= len(data):
                    break
                length |= (data[at + n] & 0x7F) << shift
                shift += 7
                if data[at + n] < 0x80:
                    header = n + 1
                    break
            connecting = self.version is None
            if header is None:
                if at + 4 < len(data):
                    return self._closed(end, {MALFORMED}, connecting, "five bytes of length")
                return self._pending(end)
            if header > 2 and data[at + header - 1] == 0:
                return self._either(end, "a length in more bytes than needed")
            total = header + length
            limit = self.connect_maximum if connecting else self.maximum
            if connecting and data[at] != 0x10:
                # [MQTT-3.1.0-1]; a server may wait for the whole packet or not.
                return self._closed(end, set(), True, "no CONNECT first")
            if total > limit:
                return self._closed(end, {TOO_LARGE}, connecting, "above the limit")
            if at + total > len(data):
                return self._pending(end)
            first, body = data[at], data[at + header : at + total]
            at += total
            end.packets += 1
            reader = Reader(body)
            try:
                answer = self._packet(first, reader, end)
            except Cut:
                answer = None
            except Choice:
                return self._either(end, "the server may choose")
            if reader.faults and not (reader.choice and first >> 4 == PUBLISH):
                what = f"packet {end.packets} {bytes([first]).hex()}{body[:60].hex()}"
                return self._closed(end, reader.faults, connecting, what)
            if reader.choice:
                return self._either(end, "the server may choose")
            if answer in (GOODBYE, CLOSED):
                end.how = answer
                return end
        return end

    def _closed(self, end, codes, connecting, why):
        end.how, end.codes, end.why = CLOSED, set(codes), why
        if connecting:
            end.connack = None
        return end

    def _pending(self, end):
        end.how = PENDING
        return end

    def _either(self, end, why):
        end.how, end.why = EITHER, why
        return end

    def _packet(self, first, r, end):
        kind, flags = first >> 4, first & 15
        if self.version is None:
            return self._connect(flags, r, end)
        v5 = self.version == 5
        if self.version == 3 and kind in (PUBREL, SUBSCRIBE, UNSUBSCRIBE):
            # MQTT 3.1 sets DUP when it repeats one of these.
            flags &= ~8
        if kind != PUBLISH and flags != (2 if kind in (PUBREL, SUBSCRIBE, UNSUBSCRIBE) else 0):
            r.fault(MALFORMED)
        if kind == CONNECT:
            # [MQTT-3.1.0-2]
            r.fault(PROTOCOL)
        elif kind == PUBLISH:
            self._publish(flags, r, end)
        elif kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
            packet_id = r.id()
            code = 0
            if v5 and r.at < len(r.body):
                code = r.byte()
                if code not in REASONS[PUBACK if kind in (PUBACK, PUBREC) else PUBREL]:
                    r.fault(MALFORMED, PROTOCOL)
                if r.at < len(r.body):
                    r.properties(PUBACK)
            r.end()
            if kind == PUBREL:
                self.received.discard(packet_id)
                end.owed.append((PUBCOMP, packet_id, 0))
            elif kind == PUBREC:
                end.allowed.append((PUBREL, packet_id, 0))
        elif kind == SUBSCRIBE:
            packet_id = r.id()
            if v5:
                r.properties(SUBSCRIBE)
            filters = 0
            while r.at < len(r.body):
                topic_filter, options = r.text(FILTER), r.byte()
                filters += 1
                if options & (0xC0 if v5 else 0xFC):
                    r.fault(MALFORMED)
                if options & 3 == 3:
                    r.fault(PROTOCOL)
                if v5 and options & 0x30 == 0x30:
                    r.fault(PROTOCOL)
                if topic_filter.startswith("$share/"):
                    if v5 and options & 4:
                        r.fault(PROTOCOL)
                    name, slash, rest = topic_filter[7:].partition("/")
                    if not name or not slash or not rest or "+" in name or "#" in name:
                        r.choice = True
                        continue
                    filter_faults(r, rest)
                    # Where they are not supported, or the version has none, the rest is not looked at.
                    r.choice |= bool(r.faults)
                    continue
                filter_faults(r, topic_filter)
            if not filters:
                # [MQTT-3.8.3-2]
                r.fault(PROTOCOL)
            end.owed.append((SUBACK, packet_id, filters))
        elif kind == UNSUBSCRIBE:
            packet_id = r.id()
            if v5:
                r.properties(UNSUBSCRIBE)
            filters = 0
            while r.at < len(r.body):
                inner = Reader(b"")
                filter_faults(inner, r.text(FILTER))
                # UNSUBACK has a code for it, 3.1.1 nothing: either will do.
                r.choice |= bool(inner.faults) or inner.choice
                filters += 1
            if not filters:
                r.fault(PROTOCOL)
            end.owed.append((UNSUBACK, packet_id, filters if v5 else 0))
        elif kind == PINGREQ:
            r.end()
            end.owed.append((PINGRESP, 0, 0))
        elif kind == DISCONNECT:
            if not v5:
                r.end()
            elif r.body:
                code = r.byte()
                if code not in REASONS[DISCONNECT]:
                    if 0x80 <= code < 0xA3:
                        raise Choice
                    r.fault(MALFORMED, PROTOCOL)
                if r.at < len(r.body):
                    found = r.properties(DISCONNECT)
                    if found.get("session_expiry") and self.expiry == 0:
                        r.fault(PROTOCOL)
                    if "server_reference" in found:
                        raise Choice
                r.end()
            if not r.faults:
                return GOODBYE
        elif kind == AUTH and v5:
            # No method was agreed on (4.12).
            r.fault(PROTOCOL, MALFORMED)
        else:
            r.fault(MALFORMED, PROTOCOL)
        return None

    def _publish(self, flags, r, end):
        v5 = self.version == 5
        qos = flags >> 1 & 3
        if qos == 3:
            r.fault(MALFORMED)
            return
        if qos == 0 and flags & 8:
            # [MQTT-3.3.1-2]
            r.fault(MALFORMED, PROTOCOL)
        topic = r.text(TOPIC_NAME)
        packet_id = r.id() if qos else 0
        found = r.properties(PUBLISH) if v5 else {}
        if qos == 2 and packet_id in self.received:
            # Taken for the first one's repetition, by its id alone.
            r.choice = True
        topic_faults(r, topic)
        if "subscription_id" in found:
            # [MQTT-3.3.4-6]
            r.fault(PROTOCOL)
        if "response_topic" in found:
            answers = found["response_topic"]
            if not answers or "+" in answers or "#" in answers:
                # [MQTT-3.3.2-14]; the reason is not named.
                r.fault(PROTOCOL, MALFORMED, TOPIC_NAME)
            r.choice |= answers.count("/") >= LEVELS_MAX
        alias = found.get("topic_alias")
        if alias == 0:
            # [MQTT-3.3.2-8]; the reason is not named.
            r.fault(MALFORMED, PROTOCOL, ALIAS)
        elif alias is not None and alias > ALIAS_MAX:
            r.fault(ALIAS)
        elif alias is not None and topic:
            if not r.faults:
                self.aliases.add(alias)
        elif alias is not None and alias not in self.aliases:
            r.fault(PROTOCOL)
        elif not topic and alias is None and not r.faults:
            r.fault(*([PROTOCOL] if v5 else [MALFORMED]))
        if found.get("payload_format") == 1:
            try:
                r.body[r.at :].decode()
            except UnicodeDecodeError:
                r.choice = True
        if qos == 2 and not r.faults:
            self.received.add(packet_id)
        if qos:
            end.owed.append((PUBACK if qos == 1 else PUBREC, packet_id, 0))

    def _connect(self, flags, r, end):
        """Sets version and CONNACK codes. [3.1]"""
        if flags:
            r.fault(MALFORMED)
        name = r.data()
        level = r.byte()
        known = {(b"MQIsdp", 3): 3, (b"MQTT", 4): 4, (b"MQTT", 5): 5}.get((name, level))
        if known is None:
            # [MQTT-3.1.2-1, -2]: 0x84 (0x01), or just closed.
            r.fault(0x84, MALFORMED, PROTOCOL)
            raise Cut
        end.version = known
        v5 = known == 5
        options = r.byte()
        if options & 1:
            # [MQTT-3.1.2-3]; 3.1 says nothing of the bit.
            r.fault(MALFORMED) if known != 3 else setattr(r, "choice", True)
        will, will_qos, will_retain = bool(options & 4), options >> 3 & 3, bool(options & 0x20)
        has_user, has_password = bool(options & 0x80), bool(options & 0x40)
        if will_qos == 3:
            r.fault(MALFORMED, PROTOCOL)
        if not will and (will_qos or will_retain):
            # [MQTT-3.1.2-11, -13, -15]
            r.fault(MALFORMED, PROTOCOL)
        if has_password and not has_user and not v5:
            r.fault(PROTOCOL)
        r.two()
        found = r.properties(CONNECT) if v5 else {}
        if "auth_data" in found and "auth_method" not in found:
            r.fault(PROTOCOL)
        client_id = r.text(0x85)
        clean = bool(options & 2)
        codes = {0}
        if not client_id and not r.faults and (known == 3 or known == 4 and not clean):
            codes = {0x85}
        if known == 3 and len(client_id) > 23:
            r.choice = True
        if will:
            if v5:
                will_found = r.properties("will")
                answers = will_found.get("response_topic", "x")
                if not answers or "+" in answers or "#" in answers:
                    r.fault(PROTOCOL, MALFORMED, TOPIC_NAME)
            topic = r.text(TOPIC_NAME)
            topic_faults(r, topic)
            if not topic:
                r.fault(MALFORMED, PROTOCOL, TOPIC_NAME)
            r.data()
        if has_user:
            r.text()
            codes = {0x86, 0x87}
        if has_password:
            r.data()
            codes = codes | {0x86, 0x87} if v5 else codes
        r.end()
        if "auth_method" in found:
            codes = {0x8C}
        if r.faults or r.choice:
            return None
        self.version = known
        # 3.1 and 3.1.1 have codes of their own.
        end.connack = codes if v5 else {{0: 0, 0x85: 2, 0x86: 4, 0x87: 5}[c] for c in codes}
        if codes != {0}:
            return EITHER if 0 in codes else CLOSED
        self.expiry = found.get("session_expiry", 0) if v5 else 0
        return None


def answers(inbox):
    """Splits what came back: [(first, body)], and what is left."""
    out, at = [], 0
    while at + 2 <= len(inbox):
        length = shift = 0
        for n in range(1, 5):
            if at + n >= len(inbox):
                return out, inbox[at:]
            length |= (inbox[at + n] & 0x7F) << shift
            shift += 7
            if inbox[at + n] < 0x80:
                break
        end = at + n + 1 + length
        if end > len(inbox):
            break
        out.append((inbox[at], inbox[at + n + 1 : end]))
        at = end
    return out, inbox[at:]


PING = packet(PINGREQ, 0, b"")
