//! Latencies in nanoseconds: 32 buckets an octave (3 % wide), minimum and maximum exact, no memory a sample.

const STEPS: u64 = 32;

pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Histogram {
    pub fn new() -> Histogram {
        Histogram {
            buckets: vec![0; 64 * STEPS as usize],
            count: 0,
            max: 0,
        }
    }

    pub fn add(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.count += 1;
        self.max = self.max.max(value);
    }

    /// The middle of the bucket in which the value at this share (0 to 1) lies.
    pub fn at(&self, share: f64) -> u64 {
        let rank = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, &n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return middle(index).min(self.max);
            }
        }
        self.max
    }

    /// `"count": …, "p50_us": …, …`, to stand inside an object.
    pub fn json(&self) -> String {
        let us = |ns: u64| ns as f64 / 1e3;
        format!(
            r#""samples":{},"p50_us":{:.1},"p99_us":{:.1},"p999_us":{:.1},"max_us":{:.1}"#,
            self.count,
            us(self.at(0.5)),
            us(self.at(0.99)),
            us(self.at(0.999)),
            us(self.max)
        )
    }
}

fn bucket(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let octave = u64::from(63 - value.leading_zeros());
    let shift = octave - 5;
    ((shift + 1) * STEPS + (value >> shift) - STEPS) as usize
}

fn middle(index: usize) -> u64 {
    let index = index as u64;
    if index < STEPS {
        return index;
    }
    let shift = index / STEPS - 1;
    ((index % STEPS + STEPS) << shift) + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_within_two_percent_of_its_values() {
        for value in (0..2_000_000u64)
            .step_by(37)
            .chain([1 << 40, (1 << 40) + 12345, 1 << 50])
        {
            let shown = middle(bucket(value));
            assert!(
                shown.abs_diff(value) as f64 <= value as f64 * 0.02,
                "{value} is shown as {shown}"
            );
        }
    }

    #[test]
    fn percentiles_and_maximum() {
        let mut histogram = Histogram::new();
        (1..=1000).for_each(|value| histogram.add(value * 1000));
        for (share, value) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.999, 999_000.0)] {
            let shown = histogram.at(share) as f64;
            assert!((shown - value).abs() <= value * 0.02, "{share}: {shown}");
        }
        assert_eq!(histogram.max, 1_000_000);
    }
}
