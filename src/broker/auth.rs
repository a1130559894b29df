//! Is a client who it says it is? Passwords are checked against Argon2id hashes, away from the network thread.
//!
//! A hash takes tens of milliseconds and 7 MiB by design, so one is checked at a time, and a password that was right
//! once is remembered as a digest under a key of this process: a thousand devices that come back at once are not a
//! thousand hashes. An address that sends wrong passwords waits ([`Logins`]).

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

use argon2::Argon2;
use argon2::password_hash::PasswordVerifier;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::codec::{Connect, WireError, reason};
use super::logins::Logins;
use super::{Shared, sys};
use crate::clock;
use crate::config::{Listener, Secret, User};

/// Passwords remembered; beyond it all are forgotten.
const REMEMBERED_MAX: usize = 10_000;

pub struct Passwords {
    /// None: no password makes a client this user.
    hashes: RefCell<HashMap<String, Option<Secret>>>,
    key: [u8; 32],
    right: RefCell<HashMap<String, [u8; 32]>>,
    one_at_a_time: Semaphore,
    logins: RefCell<Logins>,
}

/// What became of a password.
enum Checked {
    Right,
    Wrong,
    /// Too many wrong ones came from its address.
    NotLookedAt,
}

impl Passwords {
    pub fn new(users: &[User], failed_logins_per_minute: u32) -> Passwords {
        let mut key = [0; 32];
        // Without randomness nothing is remembered wrongly: the digest is then only of user and password.
        let _ = getrandom::fill(&mut key);
        Passwords {
            hashes: RefCell::new(hashes(users)),
            key,
            right: RefCell::default(),
            one_at_a_time: Semaphore::new(1),
            logins: RefCell::new(Logins::new(failed_logins_per_minute)),
        }
    }

    pub fn set_failed_logins(&self, per_minute: u32) {
        self.logins.borrow_mut().set(per_minute);
    }

    /// The users as they are now; returns those of before that are gone or have another password.
    pub fn set(&self, users: &[User]) -> HashSet<String> {
        let new = hashes(users);
        let old = self.hashes.replace(new.clone());
        let gone: HashSet<String> = old
            .into_iter()
            .filter(|(name, hash)| new.get(name) != Some(hash))
            .map(|(name, _)| name)
            .collect();
        self.right.borrow_mut().retain(|name, _| !gone.contains(name));
        gone
    }

    /// There is such a user.
    pub fn knows(&self, user: &str) -> bool {
        self.hashes.borrow().contains_key(user)
    }

    fn digest(&self, user: &str, password: &[u8]) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.key);
        hash.update((user.len() as u64).to_le_bytes());
        hash.update(user);
        hash.update(password);
        hash.finalize().into()
    }

    fn may_try(&self, from: IpAddr) -> bool {
        self.logins.borrow().may_try(from, clock::monotonic())
    }

    async fn check(&self, user: &str, password: &[u8], from: IpAddr) -> Checked {
        // Also one that was right before: whether it is may not be tried out without end.
        if !self.may_try(from) {
            return Checked::NotLookedAt;
        }
        let checked = self.look_at(user, password, from).await;
        if matches!(checked, Checked::Wrong) {
            self.logins.borrow_mut().failed(from, clock::monotonic());
        }
        checked
    }

    async fn look_at(&self, user: &str, password: &[u8], from: IpAddr) -> Checked {
        let Some(Some(hash)) = self.hashes.borrow().get(user).cloned() else {
            return Checked::Wrong;
        };
        let digest = self.digest(user, password);
        if self.right.borrow().get(user) == Some(&digest) {
            return Checked::Right;
        }
        let Ok(_turn) = self.one_at_a_time.acquire().await else {
            return Checked::Wrong;
        };
        // Others from there may have failed while this one waited for its turn.
        if !self.may_try(from) {
            return Checked::NotLookedAt;
        }
        let (hash_now, password) = (hash.clone(), password.to_vec());
        let checked = tokio::task::spawn_blocking(move || {
            argon2::password_hash::phc::PasswordHash::new(hash_now.reveal())
                .is_ok_and(|h| Argon2::default().verify_password(&password, &h).is_ok())
        });
        // A reload may have come meanwhile.
        let right = checked.await.unwrap_or(false) && self.hashes.borrow().get(user) == Some(&Some(hash));
        if right {
            let mut remembered = self.right.borrow_mut();
            if remembered.len() >= REMEMBERED_MAX {
                remembered.clear();
            }
            remembered.insert(user.to_owned(), digest);
        }
        match right {
            true => Checked::Right,
            false => Checked::Wrong,
        }
    }
}

fn hashes(users: &[User]) -> HashMap<String, Option<Secret>> {
    users
        .iter()
        .map(|u| (u.name.clone(), u.password_hash.clone()))
        .collect()
}

pub async fn check(shared: &Rc<Shared>, listener: &Listener, from: IpAddr, connect: &Connect) -> Result<(), WireError> {
    match &connect.username {
        Some(user) => {
            let password = connect.password.as_deref().unwrap_or_default();
            match shared.passwords.check(user, password, from).await {
                Checked::Right => Ok(()),
                Checked::Wrong => {
                    sys::add(&shared.tally.logins_failed, 1);
                    let why = format!("bad user name or password for user {:?}", &**user);
                    Err(WireError::new(reason::BAD_USER_OR_PASSWORD, why))
                }
                Checked::NotLookedAt => {
                    let why = format!("too many failed logins from {from}; try again in a minute");
                    Err(WireError::new(reason::CONNECTION_RATE_EXCEEDED, why))
                }
            }
        }
        None if listener.allow_anonymous => Ok(()),
        None => Err(WireError::new(
            reason::NOT_AUTHORIZED,
            "this listener lets nobody in without a user name",
        )),
    }
}
