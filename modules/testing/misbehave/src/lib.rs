//! Does what the payload says, mostly harm; any other payload is published below `done/` and counted in the state.

use tidegate_module::{
    Description, Level, Message, Module, Outcome, description, log, message, publish, state_get, state_set,
};

struct Misbehave {
    handled: u64,
    hoard: Vec<Vec<u8>>,
}

impl Module for Misbehave {
    fn describe() -> Description {
        Description {
            subscribe: vec!["do/#".into()],
            publish: vec!["done/#".into()],
            timer_ms: Some(100),
            ..description("misbehave", env!("CARGO_PKG_VERSION"))
        }
    }

    fn init(config: &str) -> Result<Misbehave, String> {
        match config {
            c if c.contains("\"refuse\"") => Err("the configuration says \"refuse\"".into()),
            c if c.contains("\"panic\"") => panic!("the configuration says \"panic\""),
            _ => Ok(Misbehave {
                handled: 0,
                hoard: Vec::new(),
            }),
        }
    }

    fn on_batch(&mut self, batch: Vec<Message>) -> Vec<Outcome> {
        let short = batch.iter().any(|m| m.payload == b"too few outcomes");
        let mut outcomes: Vec<Outcome> = batch.into_iter().map(|m| self.on_message(m)).collect();
        if short {
            outcomes.pop();
        }
        outcomes
    }

    fn on_message(&mut self, received: Message) -> Outcome {
        let below = |payload: &[u8]| message(format!("done/{}", received.topic), payload);
        match received.payload.as_slice() {
            b"panic" => panic!("the payload says panic"),
            b"trap" => core::arch::wasm32::unreachable(),
            b"loop" => loop {
                std::hint::black_box(&mut self.handled);
            },
            b"recurse" => {
                #[allow(unconditional_recursion, reason = "the stack is to run out")]
                fn deeper(n: u64) -> u64 {
                    deeper(n + 1) + std::hint::black_box(n)
                }
                self.handled += deeper(0);
                Outcome::Pass
            }
            b"memory bomb" => loop {
                self.hoard.push(vec![1; 1 << 20]);
            },
            b"slow" => {
                // Some milliseconds: well within a deadline alone, not sixty-four times.
                let mut sum = 0u64;
                for i in 0..6_000_000u64 {
                    sum = std::hint::black_box(sum.wrapping_mul(31) ^ i);
                }
                Outcome::Replace(vec![below(&sum.to_le_bytes())])
            }
            b"outside" => Outcome::Replace(vec![message("elsewhere/x", "stray")]),
            b"bad topic" => Outcome::Replace(vec![message("done/+/x", "stray")]),
            b"huge output" => {
                // The same mebibyte many times over: little memory here, a lot for a host that copies it.
                Outcome::Replace((0..64).map(|_| below(&vec![7; 200_000])).collect())
            }
            b"many" => Outcome::Replace((0..5_000).map(|_| below(b"x")).collect()),
            b"publish many" => {
                let refused = (0..5_000).filter(|_| publish(&below(b"x")).is_err()).count();
                Outcome::Reject(format!("{refused} refused"))
            }
            b"publish then trap" => {
                let _ = publish(&below(b"must not appear"));
                let _ = state_set("handled", Some(b"must not appear"));
                core::arch::wasm32::unreachable()
            }
            b"big state" => match state_set("big", Some(&vec![0; 300_000])) {
                Err(refusal) => Outcome::Replace(vec![below(refusal.as_bytes())]),
                Ok(()) => Outcome::Pass,
            },
            b"much state" => {
                for n in 0..10_000 {
                    if let Err(refusal) = state_set(&format!("key {n}"), Some(&[0; 1000])) {
                        return Outcome::Replace(vec![below(refusal.as_bytes())]);
                    }
                }
                Outcome::Pass
            }
            b"chatter" => {
                for n in 0..1_000 {
                    log(Level::Info, &format!("line {n}"));
                }
                Outcome::Pass
            }
            b"drop" => Outcome::Drop,
            b"reject" => Outcome::Reject("the payload says reject".into()),
            payload => {
                let handled = state_get("handled")
                    .and_then(|v| v.try_into().ok())
                    .map_or(0, u64::from_le_bytes)
                    + 1;
                if let Err(refusal) = state_set("handled", Some(&handled.to_le_bytes())) {
                    return Outcome::Reject(refusal);
                }
                Outcome::Replace(vec![below(payload)])
            }
        }
    }

    fn on_timer(&mut self, now_ms: i64) {
        match state_get("timer").as_deref() {
            Some(b"panic") => panic!("the state says panic"),
            _ => {
                let _ = publish(&message("done/timer", now_ms.to_string()));
            }
        }
    }
}

tidegate_module::export!(Misbehave);
