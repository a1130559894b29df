//! Averages what assets measure over a window of time, and raises an alarm when an average crosses a threshold.
//!
//! It takes the messages of connectors on `data/{asset}`, `{"temperature":{"value":21.5,"ts":"…","q":"good"},…}`, and leaves
//! out what is not of good quality or not a number. At the end of each window it publishes
//! `derived/{asset}/average` in the same shape, with `min`, `max` and `count` added; `ts` is when the last value in it came.
//! With a `threshold` it publishes `alarm/{asset}/{point}`, retained, once for each crossing.
//!
//! Configuration (`config` of [[module]]), all of it optional:
//!
//! ```toml
//! config = { window = "10 s", point = "temperature", threshold = 90.0, hysteresis = 2.0 }
//! ```
//!
//! Without `point` every point is averaged; `threshold` needs it. The alarm goes on at an average of `threshold` or more and
//! off at one of `threshold` less `hysteresis` or less.
//!
//! Windows and alarms are durable state: written in the same commit as what the messages did, so that a restart, a crash or
//! a new version of this module neither loses a value nor counts one twice.

mod json;
mod number;
mod time;

use json::{Json, quote};
use tidegate_module::{
    Description, Level, Message, Module, Outcome, description, log, message, publish, state_get, state_set,
};

/// Assets and points of one asset that are kept; more are rejected. What they keep stays below the bound of a state.
const ASSETS_MAX: usize = 128;
const POINTS_MAX: usize = 64;
const TOPIC_PREFIX: &str = "data/";
/// The state's key of the list of assets that have a window open, one a line.
const OPEN: &str = "open";

struct Average {
    config: Config,
    /// Those with a window open: few enough to be searched one by one.
    assets: Vec<(String, Window)>,
}

struct Config {
    window_ms: i64,
    point: Option<String>,
    threshold: Option<f64>,
    hysteresis: f64,
}

/// The values of one asset since `from_ms`.
struct Window {
    from_ms: i64,
    last_ms: i64,
    points: Vec<(String, Sums)>,
}

struct Sums {
    sum: f64,
    min: f64,
    max: f64,
    count: u64,
}

impl Module for Average {
    fn describe() -> Description {
        Description {
            subscribe: vec!["data/#".into()],
            publish: vec!["derived/#".into(), "alarm/#".into()],
            timer_ms: Some(1_000),
            ..description("average", env!("CARGO_PKG_VERSION"))
        }
    }

    fn init(config: &str) -> Result<Average, String> {
        let config = Config::parse(config)?;
        let mut assets = Vec::new();
        if let Some(open) = state_get(OPEN) {
            for asset in String::from_utf8_lossy(&open).lines() {
                let stored = state_get(&window_key(asset)).and_then(|bytes| Window::decode(&bytes));
                if let Some(window) = stored {
                    assets.push((asset.to_owned(), window));
                }
            }
        }
        Ok(Average { config, assets })
    }

    fn on_message(&mut self, message: Message) -> Outcome {
        let Some(asset) = message.topic.strip_prefix(TOPIC_PREFIX) else {
            return Outcome::Pass;
        };
        match self.take(asset, &message) {
            Ok(()) => Outcome::Pass,
            Err(why) => Outcome::Reject(why),
        }
    }

    fn on_timer(&mut self, now_ms: i64) {
        let over = |window: &Window| self.config.is_over(window, now_ms);
        let assets: Vec<String> = self
            .assets
            .iter()
            .filter(|(_, window)| over(window))
            .map(|(asset, _)| asset.clone())
            .collect();
        for asset in assets {
            self.close(&asset);
        }
    }
}

impl Average {
    fn window(&self, asset: &str) -> Option<&Window> {
        self.assets
            .iter()
            .find(|(open, _)| open == asset)
            .map(|(_, window)| window)
    }

    fn take(&mut self, asset: &str, message: &Message) -> Result<(), String> {
        let values = Json::parse(&message.payload)?;
        let Json::Object(points) = &values else {
            return Err("not a JSON object of points".into());
        };
        let now_ms = message.received_ms;
        if self
            .window(asset)
            .is_some_and(|window| self.config.is_over(window, now_ms))
        {
            self.close(asset);
        }
        let good = points.iter().filter_map(|(name, point)| {
            let wanted = self.config.point.as_ref().is_none_or(|only| only == name);
            let good = point.get("q").is_none_or(|q| matches!(q, Json::Text(q) if q == "good"));
            match point.get("value") {
                Some(Json::Number(value)) if wanted && good => Some((name, *value)),
                _ => None,
            }
        });
        let good: Vec<(&String, f64)> = good.take(POINTS_MAX + 1).collect();
        if good.is_empty() {
            return Ok(());
        }
        let window = self.window(asset);
        let new = good
            .iter()
            .filter(|(name, _)| window.is_none_or(|window| window.sums(name).is_none()))
            .count();
        if window.map_or(0, |window| window.points.len()) + new > POINTS_MAX {
            return Err(format!("more than {POINTS_MAX} points"));
        }
        if window.is_none() {
            if self.assets.len() >= ASSETS_MAX {
                return Err(format!("more than {ASSETS_MAX} assets at once"));
            }
            let window = Window {
                from_ms: now_ms,
                last_ms: now_ms,
                points: Vec::new(),
            };
            self.assets.push((asset.to_owned(), window));
            self.keep_open()?;
        }
        let Some((_, window)) = self.assets.iter_mut().find(|(open, _)| open == asset) else {
            return Ok(());
        };
        window.last_ms = now_ms;
        for (name, value) in good {
            window.add(name, value);
        }
        state_set(&window_key(asset), Some(&window.encode()))
    }

    /// The window is over: out with its averages.
    fn close(&mut self, asset: &str) {
        let Some(n) = self.assets.iter().position(|(open, _)| open == asset) else {
            return;
        };
        let (_, window) = self.assets.remove(n);
        // Each on its own: where the gateway allows only one of the topics, the other is published all the same.
        let told = [
            publish(&message(format!("derived/{asset}/average"), window.to_json())),
            self.judge(asset, &window),
            state_set(&window_key(asset), None),
            self.keep_open(),
        ];
        for why in told.into_iter().filter_map(Result::err) {
            log(Level::Warn, &format!("at the end of a window of {asset}: {why}"));
        }
    }

    /// Raises or ends the alarm where the average crossed the threshold.
    fn judge(&self, asset: &str, window: &Window) -> Result<(), String> {
        let (Some(threshold), Some(point)) = (self.config.threshold, &self.config.point) else {
            return Ok(());
        };
        let Some(sums) = window.sums(point) else { return Ok(()) };
        let average = sums.average();
        let key = format!("alarm {asset} {point}");
        let was_on = state_get(&key).is_some();
        let is_on = if was_on {
            average > threshold - self.config.hysteresis
        } else {
            average >= threshold
        };
        if is_on == was_on {
            return Ok(());
        }
        let mut text = String::from("{\"point\":");
        quote(&mut text, point);
        let state = if is_on { "on" } else { "off" };
        text.push_str(",\"state\":\"");
        text.push_str(state);
        text.push_str("\",\"average\":");
        number::write(&mut text, average);
        text.push_str(",\"threshold\":");
        number::write(&mut text, threshold);
        text.push_str(",\"ts\":\"");
        time::write_rfc3339(&mut text, window.last_ms);
        text.push_str("\"}");
        state_set(&key, is_on.then_some(b"on"))?;
        publish(&Message {
            retain: true,
            ..message(format!("alarm/{asset}/{point}"), text)
        })
    }

    fn keep_open(&self) -> Result<(), String> {
        let open: String = self
            .assets
            .iter()
            .flat_map(|(asset, _)| [asset.as_str(), "\n"])
            .collect();
        state_set(OPEN, (!open.is_empty()).then_some(open.as_bytes()))
    }
}

fn window_key(asset: &str) -> String {
    format!("window {asset}")
}

impl Config {
    fn parse(text: &str) -> Result<Config, String> {
        let mut config = Config {
            window_ms: 10_000,
            point: None,
            threshold: None,
            hysteresis: 0.0,
        };
        let Json::Object(members) = Json::parse(text.as_bytes())? else {
            return Err("config must be a table".into());
        };
        for (key, value) in members {
            match (key.as_str(), value) {
                ("window", Json::Text(text)) => {
                    config.window_ms = time::parse_duration(&text)
                        .filter(|ms| (100..=86_400_000).contains(ms))
                        .ok_or_else(|| {
                            format!("window = {text:?} is not a time of 100 ms to 24 h, such as \"10 s\"")
                        })?;
                }
                ("point", Json::Text(text)) if !text.is_empty() => config.point = Some(text),
                ("threshold", Json::Number(number)) => config.threshold = Some(number),
                ("hysteresis", Json::Number(number)) if number >= 0.0 => config.hysteresis = number,
                ("window" | "point" | "threshold" | "hysteresis", _) => {
                    return Err(format!("{key} does not have a value of the right kind"));
                }
                _ => {
                    return Err(format!(
                        "unknown key {key:?}: known are window, point, threshold, hysteresis"
                    ));
                }
            }
        }
        if config.threshold.is_some() && config.point.is_none() {
            return Err("threshold needs point: the name of the point that it is for".into());
        }
        Ok(config)
    }

    /// A clock that was set back ends a window as well: it would last for ever otherwise.
    fn is_over(&self, window: &Window, now_ms: i64) -> bool {
        now_ms >= window.from_ms.saturating_add(self.window_ms) || now_ms < window.from_ms
    }
}

impl Window {
    fn sums(&self, name: &str) -> Option<&Sums> {
        self.points
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, sums)| sums)
    }

    fn add(&mut self, name: &str, value: f64) {
        if let Some((_, sums)) = self.points.iter_mut().find(|(known, _)| known == name) {
            sums.sum += value;
            sums.min = sums.min.min(value);
            sums.max = sums.max.max(value);
            sums.count += 1;
        } else {
            self.points.push((
                name.to_owned(),
                Sums {
                    sum: value,
                    min: value,
                    max: value,
                    count: 1,
                },
            ));
        }
    }

    fn to_json(&self) -> String {
        let mut text = String::from("{");
        for (n, (name, sums)) in self.points.iter().enumerate() {
            if n > 0 {
                text.push(',');
            }
            quote(&mut text, name);
            text.push_str(":{\"value\":");
            number::write(&mut text, sums.average());
            text.push_str(",\"ts\":\"");
            time::write_rfc3339(&mut text, self.last_ms);
            text.push_str("\",\"q\":\"good\"");
            for (key, value) in [("min", sums.min), ("max", sums.max), ("count", sums.count as f64)] {
                text.push(',');
                quote(&mut text, key);
                text.push(':');
                number::write(&mut text, value);
            }
            text.push('}');
        }
        text.push('}');
        text
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&self.from_ms.to_le_bytes());
        bytes.extend_from_slice(&self.last_ms.to_le_bytes());
        for (name, sums) in &self.points {
            for number in [sums.sum, sums.min, sums.max] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&sums.count.to_le_bytes());
            bytes.extend_from_slice(&(name.len() as u64).to_le_bytes());
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }

    fn decode(mut bytes: &[u8]) -> Option<Window> {
        fn eight(bytes: &mut &[u8]) -> Option<[u8; 8]> {
            let (first, rest) = bytes.split_first_chunk::<8>()?;
            *bytes = rest;
            Some(*first)
        }
        let from_ms = i64::from_le_bytes(eight(&mut bytes)?);
        let last_ms = i64::from_le_bytes(eight(&mut bytes)?);
        let mut points = Vec::new();
        while !bytes.is_empty() {
            let sum = f64::from_le_bytes(eight(&mut bytes)?);
            let min = f64::from_le_bytes(eight(&mut bytes)?);
            let max = f64::from_le_bytes(eight(&mut bytes)?);
            let count = u64::from_le_bytes(eight(&mut bytes)?);
            let length = usize::try_from(u64::from_le_bytes(eight(&mut bytes)?)).ok()?;
            let (name, rest) = bytes.split_at_checked(length)?;
            bytes = rest;
            points.push((String::from_utf8(name.to_vec()).ok()?, Sums { sum, min, max, count }));
        }
        Some(Window {
            from_ms,
            last_ms,
            points,
        })
    }
}

impl Sums {
    fn average(&self) -> f64 {
        self.sum / self.count as f64
    }
}

tidegate_module::export!(Average);
