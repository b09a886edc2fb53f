//! Places in the queue, and whose they are: nobody fills it for everybody else. Knows neither requests nor what they wait for.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Whose a request is, as far as that can be told: owners take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// Of this key, by its place in the list.
    Key(usize),
    /// Without keys, of this address.
    Peer(IpAddr),
    /// The server itself.
    Server,
}

impl Owner {
    /// An IPv6 address counts by its first 64 bits: whoever has one has all that begin alike.
    pub(crate) fn of_peer(peer: IpAddr) -> Owner {
        Owner::Peer(match peer.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
            v4 => v4,
        })
    }
}

/// All places that are taken.
#[derive(Debug, Default)]
pub(crate) struct Places {
    total: AtomicUsize,
    by_owner: Mutex<HashMap<Owner, usize>>,
}

impl Places {
    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.total.load(Ordering::Acquire)
    }

    /// `n` places for `owner` of a queue that holds `most`, or none. Who has none yet gets them even from a queue that others
    /// have filled, up to as many again.
    pub(crate) fn take(self: &Arc<Places>, owner: Owner, n: usize, most: usize) -> Option<Vec<Ticket>> {
        let mut by_owner = self.by_owner.lock().unwrap_or_else(PoisonError::into_inner);
        let others_fill_it = !by_owner.is_empty() && !by_owner.contains_key(&owner);
        let most = if others_fill_it { most.saturating_mul(2) } else { most };
        // Only changed under the lock.
        let then = self.taken().checked_add(n).filter(|&then| then <= most)?;
        if n > 0 {
            self.total.store(then, Ordering::Release);
            *by_owner.entry(owner).or_default() += n;
        }
        Some((0..n).map(|_| Ticket { places: self.clone(), owner }).collect())
    }
}

/// A place in the queue, held from before a request is accepted until its turn comes.
#[derive(Debug)]
pub(crate) struct Ticket {
    places: Arc<Places>,
    owner: Owner,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut by_owner = self.places.by_owner.lock().unwrap_or_else(PoisonError::into_inner);
        self.places.total.fetch_sub(1, Ordering::AcqRel);
        if let Some(own) = by_owner.get_mut(&self.owner) {
            *own -= 1;
            if *own == 0 {
                by_owner.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_the_queue() {
        let places = Arc::new(Places::default());
        let (a, b) = (Owner::Key(1), Owner::Key(2));
        let two = places.take(a, 2, 3).expect("free");
        assert!(places.take(a, 2, 3).is_none(), "all or none");
        let one = places.take(a, 1, 3).expect("free");
        assert!(places.take(a, 1, 3).is_none());
        assert!(places.take(a, usize::MAX, 3).is_none());
        let other = places.take(b, 1, 3).expect("it is another who has filled the queue");
        assert!(places.take(b, 1, 3).is_none(), "who waits already waits for that");
        assert!(places.take(Owner::Key(3), 3, 3).is_none(), "there is an end to it");
        assert_eq!(places.taken(), 4);
        drop((two, one, other));
        assert_eq!(places.taken(), 0);
        assert!(places.take(a, 4, 3).is_none(), "alone nobody gets more than there are");
        assert!(places.by_owner.lock().expect("unharmed").is_empty(), "nobody is remembered");
    }

    #[test]
    fn peers() {
        let owner = |peer: &str| Owner::of_peer(peer.parse().expect("an address"));
        let check = |one: &str, other: &str, same: bool| {
            assert_eq!(owner(one) == owner(other), same, "{one} {other}");
        };
        check("10.0.0.1", "10.0.0.1", true);
        check("10.0.0.1", "10.0.0.2", false);
        check("::ffff:10.0.0.1", "10.0.0.1", true);
        check("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", true);
        check("2001:db8:0:1::1", "2001:db8:0:2::1", false);
    }
}
