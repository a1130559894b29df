"""A server of stock pymodbus, for the tests: the same values as modbus_peer.c gives, and units of its own.

    modbus_pymodbus.py tcp|rtu-tcp PORT | rtu DEVICE   UNIT…   [static] [mute]

With `mute` the other units of a serial line say nothing; pymodbus itself answers for them with an exception.
"""

import asyncio
import sys

from pymodbus.framer import FramerType
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice


def device(unit, static):
    counter = 0

    async def action(function, first, address, count, registers, values):
        nonlocal counter
        if values is not None or static:
            return None
        counter += 1
        for at in range(address, address + count):
            registers[at - first] = (at * 7 + unit * 1009 + counter) & 0xFFFF
        return None

    block = lambda: [SimData(0, values=0, count=2000, datatype=DataType.REGISTERS)]
    bits = lambda: [SimData(0, values=False, count=2000, datatype=DataType.BITS)]
    return SimDevice(id=unit, simdata=(bits(), bits(), block(), block()), action=None if static else action)


async def main(kind, place, *rest):
    static = "static" in rest
    devices = [device(int(unit), static) for unit in rest if unit.isdigit()]
    if kind == "rtu":
        units = {device.id for device in devices}
        said = lambda sending, data: b"" if sending and "mute" in rest and data[0] not in units else data
        server = ModbusSerialServer(devices, framer=FramerType.RTU, port=place, baudrate=9600, trace_packet=said)
    else:
        framer = FramerType.SOCKET if kind == "tcp" else FramerType.RTU
        server = ModbusTcpServer(devices, framer=framer, address=("127.0.0.1", int(place)))
    await server.serve_forever(background=True)
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
