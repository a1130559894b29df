//! `tidegate module bench FILE`: what a call into a module costs, for its author and for `benches/run`.
//!
//! The messages are 256 B on a topic of 27 B, without properties; the best of many short samples is printed, since what
//! disturbs a sample only ever makes it longer.

use std::path::Path;

use anyhow::{Context, anyhow};

use super::compile;
use super::host::{Engine, Instance, Limits, Program};
use crate::clock;
use crate::config::ModuleSettings;
use crate::message::{Message, Topic, TopicFilter};

const SAMPLES: usize = 200;
const MESSAGES_A_SAMPLE: usize = 6_400;

/// `{"batch1_ns": …, "batch64_ns": …}`: nanoseconds a message.
pub fn run(path: &Path) -> anyhow::Result<String> {
    let wasm = compile::read_bounded(path)?;
    let component = compile::component(&wasm)?;
    let engine = Engine::new()?;
    let program = Program::compile(&engine, &component)?;
    let settings = ModuleSettings::default();
    let limits = Limits {
        memory_bytes_max: settings.memory_bytes_max,
        deadline: settings.deadline,
    };
    let mut figures = serde_json::Map::new();
    for batch in [1, 64] {
        let mut instance =
            Instance::start(&engine, &program, "bench", limits, Vec::new()).context("it does not start")?;
        let description = instance.describe().context("describe")?;
        let publish = description
            .publish
            .iter()
            .filter_map(|f| TopicFilter::new(f.clone()).ok())
            .collect();
        instance.grant(publish, description.wants_properties);
        instance.init("{}").map_err(|e| anyhow!("{e}"))?;
        figures.insert(format!("batch{batch}_ns"), best_ns(&mut instance, batch)?.into());
    }
    Ok(serde_json::Value::Object(figures).to_string())
}

fn best_ns(instance: &mut Instance, batch: usize) -> anyhow::Result<u64> {
    let topic = Topic::new("sensors/press-7/temperature").context("a plain topic")?;
    let message = Message::new(topic, vec![b'x'; 256], "client:bench".into(), clock::wall());
    let messages = vec![message; batch];
    let calls = MESSAGES_A_SAMPLE / batch;
    let mut best = u64::MAX;
    for _ in 0..SAMPLES {
        let began = clock::monotonic();
        for _ in 0..calls {
            instance.on_batch(messages.iter()).context("a call failed")?;
        }
        let ns = began.elapsed().as_nanos() / (calls * batch) as u128;
        best = best.min(u64::try_from(ns).unwrap_or(u64::MAX));
    }
    Ok(best)
}
