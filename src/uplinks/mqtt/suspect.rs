//! A message that kills every connection it is sent on, found out with care. Pure.
//!
//! A version 3.1.1 remote has no way to say "too large": it closes. (A version 5 one says 0x95, or closes as well.)
//! Without a rule the same message is sent for ever and everything behind it waits. But a remote closes for many
//! reasons, and a good message set aside for another's fault is worse than a wait. So a message is only given up when
//! all of this holds: it is large (64 KiB and more; limits are larger than that everywhere), it was first in line when
//! the remote closed three connections in a row without one acknowledgement, and then, sent alone on a connection that
//! had just answered a PINGREQ, it ended three more. A remote that drops whoever connects never gets as far as that
//! PINGRESP and convicts nobody.

use crate::log::consumer::{Entry, Position};

const SIZE_BYTES_MIN: usize = 64 << 10;
const CLOSED_MAX: u32 = 3;
const ALONE_MAX: u32 = 3;

#[derive(Debug, Default)]
pub(super) struct Suspect {
    position: Option<Position>,
    closed: u32,
    alone: u32,
}

/// How the next connection is to treat the first message in line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    Normal,
    /// Ask for a PINGRESP first, then send this one message and nothing else until it is answered.
    Alone,
}

impl Suspect {
    pub(super) fn plan(&self) -> Plan {
        if self.closed >= CLOSED_MAX {
            Plan::Alone
        } else {
            Plan::Normal
        }
    }

    /// Something was acknowledged.
    pub(super) fn progress(&mut self) {
        *self = Suspect::default();
    }

    /// The remote closed the connection while `head` was sent and not acknowledged, and nothing was acknowledged on
    /// it. `alone`: it was sent by [`Plan::Alone`]. `said_too_large`: by reason code 0x95. True: the message is the
    /// cause.
    pub(super) fn closed(&mut self, head: &Entry, alone: bool, said_too_large: bool) -> bool {
        if head.message.size_bytes() < SIZE_BYTES_MIN {
            *self = Suspect::default();
            return false;
        }
        if self.position != Some(head.position) {
            *self = Suspect {
                position: Some(head.position),
                closed: 0,
                alone: 0,
            };
        }
        if alone {
            self.alone += 1;
        } else {
            self.closed = if said_too_large { CLOSED_MAX } else { self.closed + 1 };
        }
        self.alone >= ALONE_MAX || (alone && said_too_large)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uplinks::routes::tests::entry;

    #[test]
    fn six_strikes_and_only_for_the_same_large_message() {
        let large = entry(7, "a", vec![0; 200 << 10]);
        let mut suspect = Suspect::default();
        for _ in 0..3 {
            assert_eq!(suspect.plan(), Plan::Normal);
            assert!(!suspect.closed(&large, false, false));
        }
        assert_eq!(suspect.plan(), Plan::Alone);
        assert!(!suspect.closed(&large, true, false));
        assert!(!suspect.closed(&large, true, false));
        assert!(suspect.closed(&large, true, false));
    }

    #[test]
    fn progress_and_another_head_clear_it() {
        let large = entry(7, "a", vec![0; 200 << 10]);
        let mut suspect = Suspect::default();
        suspect.closed(&large, false, false);
        suspect.closed(&large, false, false);
        suspect.progress();
        assert!(!suspect.closed(&large, false, false));
        assert!(!suspect.closed(&entry(8, "a", vec![0; 200 << 10]), false, false));
        assert_eq!(suspect.plan(), Plan::Normal);
    }

    #[test]
    fn a_small_message_is_never_given_up() {
        let small = entry(7, "a", vec![0; 1 << 10]);
        let mut suspect = Suspect::default();
        for _ in 0..1_000 {
            assert!(!suspect.closed(&small, false, true));
            assert_eq!(suspect.plan(), Plan::Normal);
        }
    }

    #[test]
    fn a_remote_that_says_too_large_needs_one_more_proof() {
        let large = entry(7, "a", vec![0; 200 << 10]);
        let mut suspect = Suspect::default();
        assert!(!suspect.closed(&large, false, true));
        assert_eq!(suspect.plan(), Plan::Alone);
        assert!(suspect.closed(&large, true, true));
    }
}
