//! Who is next: owners take turns, each in the order of arrival, so that nobody waits for ever behind one who asks much.
//! Knows nothing of tokens or memory.

use std::collections::VecDeque;

use crate::places::Owner;

/// What waits, by owner.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    /// Owners with something waiting, the next one first.
    owners: VecDeque<(Owner, VecDeque<T>)>,
    /// What had its turn and was put back, the first to come first: before all others.
    returned: VecDeque<T>,
}

impl<T> Default for Queue<T> {
    fn default() -> Queue<T> {
        Queue { owners: VecDeque::new(), returned: VecDeque::new() }
    }
}

impl<T> Queue<T> {
    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.returned.len() + self.owners.iter().map(|(_, waiting)| waiting.len()).sum::<usize>()
    }

    /// Puts `item` behind what waits of the same owner.
    pub(crate) fn push(&mut self, owner: Owner, item: T) {
        match self.owners.iter_mut().find(|(of, _)| *of == owner) {
            Some((_, waiting)) => waiting.push_back(item),
            None => self.owners.push_back((owner, VecDeque::from([item]))),
        }
    }

    /// Puts back what had its turn: it goes before all others, and before what was put back earlier.
    pub(crate) fn put_back(&mut self, item: T) {
        self.returned.push_front(item);
    }

    /// The next one.
    pub(crate) fn pop(&mut self) -> Option<T> {
        if let Some(item) = self.returned.pop_front() {
            return Some(item);
        }
        let (owner, mut waiting) = self.owners.pop_front()?;
        let item = waiting.pop_front();
        if !waiting.is_empty() {
            self.owners.push_back((owner, waiting));
        }
        item
    }

    /// Whether `holds` does for any that waits.
    pub(crate) fn any(&self, mut holds: impl FnMut(&T) -> bool) -> bool {
        let waiting = self.owners.iter().flat_map(|(_, waiting)| waiting);
        self.returned.iter().chain(waiting).any(&mut holds)
    }

    /// Takes out whatever `keep` does not want.
    pub(crate) fn take_unless(&mut self, mut keep: impl FnMut(&T) -> bool) -> Vec<T> {
        let mut gone = Vec::new();
        let mut sift = |waiting: &mut VecDeque<T>| {
            for item in std::mem::take(waiting) {
                if keep(&item) { waiting.push_back(item) } else { gone.push(item) }
            }
        };
        sift(&mut self.returned);
        self.owners.iter_mut().for_each(|(_, waiting)| sift(waiting));
        self.owners.retain(|(_, waiting)| !waiting.is_empty());
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_take_turns() {
        let check = |arrivals: &[(usize, &'static str)], want: &[&str]| {
            let mut queue = Queue::default();
            arrivals.iter().for_each(|&(owner, item)| queue.push(Owner::Key(owner), item));
            assert_eq!(queue.len(), arrivals.len());
            let got: Vec<&str> = std::iter::from_fn(|| queue.pop()).collect();
            assert_eq!(got, want, "{arrivals:?}");
        };
        check(&[], &[]);
        check(&[(1, "a"), (1, "b"), (1, "c")], &["a", "b", "c"]);
        check(&[(1, "a"), (1, "b"), (1, "c"), (2, "d"), (3, "e"), (2, "f")], &["a", "d", "e", "b", "f", "c"]);
    }

    #[test]
    fn back_and_gone() {
        let mut queue = Queue::default();
        for item in 1..=6 {
            queue.push(Owner::Key(item % 2), item);
        }
        let first = queue.pop().expect("six wait");
        assert_eq!(first, 1);
        queue.put_back(first);
        assert_eq!(queue.take_unless(|item| item % 3 > 0), [6, 3]);
        let rest: Vec<usize> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(rest, [1, 2, 5, 4]);
        // An owner of whom nothing is left does not hold a place.
        queue.push(Owner::Key(1), 7);
        assert_eq!(queue.take_unless(|_| false), [7]);
        assert_eq!((queue.len(), queue.pop()), (0, None));
    }
}
