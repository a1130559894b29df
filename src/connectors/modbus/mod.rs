//! Modbus over TCP, over a serial line (RTU), and over a serial line behind TCP: the driver of one line.
//!
//! [`plan`] says which requests read the points of a poll and learns what a device refuses, [`value`] turns registers
//! into values and back, [`wire`] owns the connection and keeps wrong answers out, [`guard`] helps it on serial lines.

mod guard;
mod plan;
mod value;
pub mod wire;

use std::sync::Arc;

pub use plan::Span;
use plan::{Limits, Memory, Plan, Poll, Verdict};
use wire::{Counters, Data, Failure, Wire, Write, exception};

use super::Setup;
use super::driver::{Driver, Fault, Raw, Sample};
use crate::clock;
use crate::config::{self, Address, DataType, Device, ModbusAddress, ModbusLine, WriteFunction};
use crate::status::Part;

/// Plans kept of one asset: those of its poll groups, and of what commands ask for.
const PLANS_MAX: usize = 16;
/// What one request writes.
const WRITE_REGISTERS_MAX: usize = 123;

/// The driver of one line.
pub struct Modbus {
    wire: Wire,
    limits: Limits,
    units: Vec<Unit>,
}

/// One asset.
struct Unit {
    unit: u8,
    points: Vec<Place>,
    memory: Memory,
    plans: Vec<Planned>,
    /// Of [`Wire::revivals`]: what was learned belongs to the device as it was before.
    revivals: u64,
}

#[derive(Clone, Copy)]
struct Place {
    address: ModbusAddress,
    data: DataType,
    span: Span,
}

struct Planned {
    points: Vec<usize>,
    generation: u64,
    plan: Arc<Plan>,
}

impl Modbus {
    pub fn new(setup: &Setup, line: &ModbusLine, part: &Part) -> Modbus {
        let counters = Counters {
            requests: part.counter("requests"),
            timeouts: part.counter("timeouts"),
            exceptions: part.counter("exceptions"),
            reconnects: part.counter("reconnects"),
            stale: part.counter("stale"),
            unguarded: part.counter("unguarded"),
        };
        Modbus {
            limits: Limits::of(line),
            wire: Wire::new(line.clone(), counters),
            units: setup.assets.iter().map(Unit::new).collect(),
        }
    }

    /// Reads one span for a command that needs its bits.
    async fn read_words(&mut self, unit: u8, span: &Span) -> Result<Vec<u16>, Failure> {
        match self.wire.read(unit, span).await? {
            Data::Words(words) => Ok(words),
            Data::Bits(_) => Ok(Vec::new()),
        }
    }
}

impl Unit {
    fn new(asset: &config::Asset) -> Unit {
        let place = |point: &config::Point| match point.address {
            Address::Modbus(address) => Some(Place {
                span: Span {
                    table: address.table,
                    start: address.start,
                    count: address.width(point.data),
                },
                address,
                data: point.data,
            }),
            _ => None,
        };
        let unit = match asset.device {
            Device::Modbus { unit } => unit,
            _ => 0,
        };
        let points: Vec<Place> = asset.points.iter().filter_map(place).collect();
        assert_eq!(
            points.len(),
            asset.points.len(),
            "a checked asset has points of its connector's kind"
        );
        Unit {
            unit,
            points,
            memory: Memory::default(),
            plans: Vec::new(),
            revivals: 0,
        }
    }

    fn plan(&mut self, points: &[usize], limits: Limits) -> Arc<Plan> {
        let generation = self.memory.generation;
        let known = self.plans.iter().position(|p| p.points == points);
        if let Some(nth) = known {
            if self.plans[nth].generation == generation {
                return Arc::clone(&self.plans[nth].plan);
            }
            self.plans.swap_remove(nth);
        }
        let places: Vec<Span> = points.iter().map(|point| self.points[*point].span).collect();
        let plan = Arc::new(Plan::new(&places, &self.memory, limits));
        if self.plans.len() >= PLANS_MAX {
            self.plans.remove(0);
        }
        self.plans.push(Planned {
            points: points.to_vec(),
            generation,
            plan: Arc::clone(&plan),
        });
        plan
    }
}

impl Place {
    fn sample(&self, block: &Span, data: &Data) -> Sample {
        let from = usize::from(self.span.start - block.start);
        match data {
            Data::Bits(bits) => Sample::Good(Raw::Bool(bits[from])),
            Data::Words(words) => {
                let to = from + usize::from(self.span.count);
                value::decode(&words[from..to], &self.address, self.data)
            }
        }
    }
}

impl Driver for Modbus {
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        let unit = &mut self.units[asset];
        if unit.revivals != self.wire.revivals {
            unit.revivals = self.wire.revivals;
            unit.memory.forget();
        }
        unit.memory.forget_old(clock::monotonic());
        let plan = unit.plan(points, self.limits);
        let refused = |unit: &Unit, point: usize, code: u8| {
            Sample::Bad(format!("{} at {}", exception(code), unit.points[points[point]].address))
        };
        samples.resize(points.len(), Sample::Bad(String::new()));
        for (nth, code) in &plan.absent {
            for point in plan.points(*nth..nth + 1) {
                samples[point] = refused(unit, point, *code);
            }
        }
        let probes = unit.memory.probes(&plan);
        let mut poll = Poll::new(&plan, &probes);
        while let Some((block, of)) = poll.next() {
            let result = self.wire.read(unit.unit, &block.span).await;
            let now = clock::monotonic();
            let of_block = plan.points(block.parts.clone());
            match result {
                Ok(data) => {
                    for point in of_block {
                        samples[point] = unit.points[points[point]].sample(&block.span, &data);
                    }
                    poll.answered(&block, of, &mut unit.memory, now);
                }
                Err(Failure::Exception(code @ (2 | 3))) => {
                    if poll.refused(&block, of, code, &mut unit.memory, now) != Verdict::Parted {
                        of_block.for_each(|point| samples[point] = refused(unit, point, code));
                    }
                }
                Err(Failure::Exception(code)) if code != 10 && code != 11 => {
                    poll.failed(of, &mut unit.memory, now);
                    of_block.for_each(|point| samples[point] = refused(unit, point, code));
                }
                Err(failure) => {
                    samples.clear();
                    return Err(lost(failure));
                }
            }
        }
        Ok(())
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        let unit = self.units[asset].unit;
        let Place { address, data, span } = self.units[asset].points[point];
        let start = address.start;
        let words = match (value, address.table.is_bits()) {
            (Raw::Bool(on), true) => vec![u16::from(*on)],
            _ => value::encode(value, &address, data).map_err(Fault::Refused)?,
        };
        if words.len() > WRITE_REGISTERS_MAX {
            let why = format!(
                "one request writes {WRITE_REGISTERS_MAX} registers, this are {}",
                words.len()
            );
            return Err(Fault::Refused(why));
        }
        let write = match address.write {
            WriteFunction::Coil => Write::Coil(start, words[0] != 0),
            WriteFunction::Coils => Write::Coils(start, vec![words[0] != 0]),
            WriteFunction::Register => Write::Register(start, words[0]),
            WriteFunction::Registers => Write::Registers(start, words),
            WriteFunction::Mask => Write::Mask {
                start,
                and: !value::mask_of(&address),
                or: words[0],
            },
            WriteFunction::ReadWrite => Write::ReadWrite(start, words),
            WriteFunction::ReadModifyWrite => {
                let read = self
                    .read_words(unit, &span)
                    .await
                    .map_err(|failure| refused_or_lost(failure, &address))?;
                let old = read.first().copied().unwrap_or_default();
                Write::Register(start, old & !value::mask_of(&address) | words[0])
            }
        };
        let held = self.wire.write(unit, &write).await.map_err(|failure| match failure {
            // It may have been carried out, and only the answer be lost.
            Failure::Timeout(_) | Failure::Closed { sent: true, .. } | Failure::Wrong(_) => {
                Fault::Unknown(format!("{write} was sent, but: {failure}"))
            }
            failure => refused_or_lost(failure, &address),
        })?;
        match write {
            Write::ReadWrite(_, words) if held != words => {
                let why = format!("written, but the device holds {held:?} in its registers instead of {words:?}");
                Err(Fault::Refused(why))
            }
            _ => Ok(()),
        }
    }
}

fn lost(failure: Failure) -> Fault {
    match failure {
        Failure::Connect(why) => Fault::Line(why),
        failure => Fault::Device(failure.to_string()),
    }
}

fn refused_or_lost(failure: Failure, address: &ModbusAddress) -> Fault {
    match failure {
        Failure::Exception(code) if code != 10 && code != 11 => {
            Fault::Refused(format!("{} at {address}", exception(code)))
        }
        failure => lost(failure),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use tokio_modbus::client::{Client as _, tcp};
    use tokio_modbus::{Request, Slave};

    use super::*;
    use crate::config::ModbusWire;

    /// A rate, not a promise: benches/modbus runs it against a server whose address it names.
    #[test]
    #[ignore = "needs a server: benches/modbus"]
    fn polling_beside_a_bare_loop() {
        const COUNT: u16 = 100;
        const ROUND: Duration = Duration::from_secs(1);
        let peer = std::env::var("TIDEGATE_MODBUS_PEER").expect("TIDEGATE_MODBUS_PEER=HOST:PORT");
        let address: SocketAddr = peer.parse().expect("an address");
        let place = |start: u16| Place {
            address: ModbusAddress {
                table: config::Table::Holding,
                start,
                bits: None,
                order: config::ByteOrder::Abcd,
                write: WriteFunction::Register,
            },
            data: DataType::Uint16,
            span: Span {
                table: config::Table::Holding,
                start,
                count: 1,
            },
        };
        let line = ModbusLine::new(ModbusWire::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        });
        let mut driver = Modbus {
            limits: Limits::of(&line),
            wire: Wire::new(line, Counters::default()),
            units: vec![Unit {
                unit: 1,
                points: (0..COUNT).map(place).collect(),
                memory: Memory::default(),
                plans: Vec::new(),
                revivals: 0,
            }],
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        runtime.expect("a runtime").block_on(async {
            let mut context = tcp::connect_slave(address, Slave(1)).await.expect("connected");
            let points: Vec<usize> = (0..usize::from(COUNT)).collect();
            for _ in 0..9 {
                let (start, mut count) = (clock::monotonic(), 0u32);
                while start.elapsed() < ROUND {
                    let read = context.call(Request::ReadHoldingRegisters(0, COUNT)).await;
                    read.expect("sound").expect("no exception");
                    count += 1;
                }
                bare.push(f64::from(count) / start.elapsed().as_secs_f64());
                let (start, mut count) = (clock::monotonic(), 0u32);
                let mut samples = Vec::new();
                while start.elapsed() < ROUND {
                    samples.clear();
                    driver.read(0, &points, &mut samples).await.expect("read");
                    assert_eq!(samples.len(), points.len());
                    count += 1;
                }
                ours.push(f64::from(count) / start.elapsed().as_secs_f64());
            }
        });
        let median = |rates: &mut Vec<f64>| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        let (bare, ours) = (median(&mut bare), median(&mut ours));
        println!("bare {bare:.0}/s, driver {ours:.0}/s, ratio {:.2}", ours / bare);
    }
}
