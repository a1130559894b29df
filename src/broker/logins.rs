//! Failed logins by address: one that sends wrong passwords waits. Pure, time as a parameter.
//!
//! Each failure is charged to its address (IPv6: to its /64, which one household or machine has whole). A minute's share may
//! fail at once; then the address is refused, whatever password it sends, until a part of the share has come back. The
//! table is bounded: in a flood from many addresses the ones that have waited longest are forgotten first.

use core::net::{IpAddr, Ipv6Addr};
use std::collections::HashMap;
use std::time::Duration;

use crate::clock::Instant;

/// Addresses that are remembered.
const ADDRESSES_MAX: usize = 4_096;
const SHARE_OF: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Logins {
    /// 0: without limit.
    per_minute: u32,
    /// When the failures so far would have come, had they come evenly.
    due: HashMap<IpAddr, Instant>,
}

impl Logins {
    pub fn new(per_minute: u32) -> Logins {
        Logins {
            per_minute,
            due: HashMap::new(),
        }
    }

    /// Another limit; what was charged stays charged.
    pub fn set(&mut self, per_minute: u32) {
        self.per_minute = per_minute;
    }

    /// Whether a password from there is looked at at all.
    pub fn may_try(&self, from: IpAddr, now: Instant) -> bool {
        let Some(cost) = self.cost() else { return true };
        let due = self.due.get(&place(from));
        due.is_none_or(|due| due.saturating_duration_since(now) + cost <= SHARE_OF)
    }

    pub fn failed(&mut self, from: IpAddr, now: Instant) {
        let Some(cost) = self.cost() else { return };
        let from = place(from);
        if self.due.len() >= ADDRESSES_MAX && !self.due.contains_key(&from) {
            self.due.retain(|_, due| *due > now);
            if self.due.len() >= ADDRESSES_MAX
                && let Some(first) = self.due.iter().min_by_key(|(_, due)| **due).map(|(from, _)| *from)
            {
                self.due.remove(&first);
            }
        }
        let due = self.due.entry(from).or_insert(now);
        *due = (*due).max(now) + cost;
    }

    /// How long one failure counts.
    fn cost(&self) -> Option<Duration> {
        SHARE_OF.checked_div(self.per_minute)
    }
}

fn place(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        ip => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn a_minutes_share_fails_at_once_and_comes_back_evenly() {
        let (mut logins, start) = (Logins::new(10), clock::monotonic());
        let failures = |logins: &mut Logins, now| {
            let mut count = 0;
            while count < 100 && logins.may_try(ip("192.0.2.1"), now) {
                logins.failed(ip("192.0.2.1"), now);
                count += 1;
            }
            count
        };
        let after = |s| start + Duration::from_secs(s);
        assert_eq!(failures(&mut logins, start), 10);
        assert!(logins.may_try(ip("192.0.2.2"), start), "another address is unaffected");
        assert_eq!(failures(&mut logins, after(5)), 0);
        assert_eq!(failures(&mut logins, after(6)), 1);
        assert_eq!(failures(&mut logins, after(36)), 5);
        assert_eq!(failures(&mut logins, after(3_600)), 10, "and no more than a share");
    }

    #[test]
    fn an_ipv6_network_is_one_and_ipv4_in_it_is_ipv4() {
        let (mut logins, now) = (Logins::new(1), clock::monotonic());
        logins.failed(ip("2001:db8:1:2::1"), now);
        assert!(!logins.may_try(ip("2001:db8:1:2:ffff::9"), now));
        assert!(logins.may_try(ip("2001:db8:1:3::1"), now));
        logins.failed(ip("::ffff:192.0.2.1"), now);
        assert!(!logins.may_try(ip("192.0.2.1"), now) && logins.may_try(ip("::ffff:192.0.2.2"), now));
    }

    #[test]
    fn a_flood_from_many_addresses_stays_bounded_and_forgets_the_oldest() {
        let (mut logins, start) = (Logins::new(1), clock::monotonic());
        for n in 0..20_000u32 {
            logins.failed(
                Ipv6Addr::new(1, 2, (n >> 16) as u16, n as u16, 0, 0, 0, 0).into(),
                start + Duration::from_millis(u64::from(n)),
            );
        }
        let end = start + Duration::from_millis(20_000);
        assert_eq!(logins.due.len(), ADDRESSES_MAX);
        assert!(
            !logins.may_try(ip("1:2:0:4e1f::"), end),
            "the last one (19,999) is remembered"
        );
        assert!(logins.may_try(ip("1:2::"), end), "the first one is not");
    }

    #[test]
    fn zero_is_without_limit() {
        let (mut logins, now) = (Logins::new(0), clock::monotonic());
        (0..100).for_each(|_| logins.failed(ip("192.0.2.1"), now));
        assert!(logins.may_try(ip("192.0.2.1"), now) && logins.due.is_empty());
        logins.set(1);
        logins.failed(ip("192.0.2.1"), now);
        assert!(!logins.may_try(ip("192.0.2.1"), now));
    }
}
