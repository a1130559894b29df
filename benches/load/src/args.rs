//! `--key value` pairs; a key that nobody asked for is an error, so that a misspelt option never runs with its default.

use std::collections::BTreeMap;
use std::error::Error;
use std::str::FromStr;

pub struct Args(BTreeMap<String, String>);

impl Args {
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Args, Box<dyn Error>> {
        let mut map = BTreeMap::new();
        let mut words = words;
        while let Some(word) = words.next() {
            let key = word
                .strip_prefix("--")
                .ok_or_else(|| format!("unexpected argument {word}"))?;
            let value = words.next().ok_or_else(|| format!("--{key} needs a value"))?;
            map.insert(key.to_owned(), value);
        }
        Ok(Args(map))
    }

    pub fn optional<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, Box<dyn Error>> {
        match self.0.remove(key) {
            None => Ok(None),
            Some(text) => Ok(Some(text.parse().map_err(|_| format!("--{key} {text} is not valid"))?)),
        }
    }

    pub fn required<T: FromStr>(&mut self, key: &str) -> Result<T, Box<dyn Error>> {
        Ok(self.optional(key)?.ok_or_else(|| format!("--{key} is missing"))?)
    }

    pub fn or<T: FromStr>(&mut self, key: &str, default: T) -> Result<T, Box<dyn Error>> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    /// Call it when every known key was taken.
    pub fn finish(self) -> Result<(), Box<dyn Error>> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(key) => Err(format!("unknown option --{key}").into()),
        }
    }
}
